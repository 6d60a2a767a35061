"""The M-BEIR format, prompts, images, plan and packing: host-side data that knows no model."""
