"""The M-BEIR layout: records, the files that hold them, the folder that holds the files.

`records` defines queries, candidates, judgments and instructions, `files` reads and writes each
kind of file, `documents` says what an id and an image path name, `layout` finds the files in a
folder, `validation` checks all of them.
"""

from puma_jax.data.lines import (
    BadRecords,
    OnBadRecord,
)
from puma_jax.data.mbeir.documents import Documents, read_image
from puma_jax.data.mbeir.files import (
    parse_candidate,
    parse_instruction,
    parse_qrel,
    parse_query,
    read_candidates,
    read_instructions,
    read_qrels,
    read_queries,
    write_candidates,
    write_instructions,
    write_qrels,
    write_queries,
)
from puma_jax.data.mbeir.layout import (
    Benchmark,
    EvaluationSet,
    discover,
)
from puma_jax.data.mbeir.records import (
    MODALITIES,
    TASKS,
    Candidate,
    Instruction,
    InstructionKey,
    Modality,
    Qrel,
    Query,
    content_key,
    dataset_id,
    instruction_key,
    modality_code,
)
from puma_jax.data.mbeir.validation import (
    Report,
    validate,
)

__all__ = [
    "MODALITIES",
    "TASKS",
    "BadRecords",
    "Benchmark",
    "Candidate",
    "Documents",
    "EvaluationSet",
    "Instruction",
    "InstructionKey",
    "Modality",
    "OnBadRecord",
    "Qrel",
    "Query",
    "Report",
    "content_key",
    "dataset_id",
    "discover",
    "instruction_key",
    "modality_code",
    "parse_candidate",
    "parse_instruction",
    "parse_qrel",
    "parse_query",
    "read_candidates",
    "read_image",
    "read_instructions",
    "read_qrels",
    "read_queries",
    "validate",
    "write_candidates",
    "write_instructions",
    "write_qrels",
    "write_queries",
]
