"""Shapes in annotations are checked at run time in every test, eight CPU devices are simulated."""

import atexit
import os
import shutil
import tempfile

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Tests compile much the same programs, above all those that start processes of their own.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache = tempfile.mkdtemp(prefix="puma-jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
# Half of the time of a test is compilation, which optimizing makes a quarter longer.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PUMA_JAX_IMAGE_WORKERS", "0")  # for few images, and many runs, on few cores

from jaxtyping import install_import_hook

install_import_hook("puma_jax", "beartype.beartype")

import pytest  # noqa: E402

from tests import reference  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random model of four small layers, in transformers and in ours."""
    return reference.pair(reference.qwen2_vl_config(), tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def no_videos():
    """Do without the processor of videos where torchvision is missing: it fits not every torch."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLProcessor, Qwen3VLProcessor
    from transformers.utils import is_torchvision_available

    with pytest.MonkeyPatch.context() as patch:
        if not is_torchvision_available():
            parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
            for processor in (Qwen2VLProcessor, Qwen2_5_VLProcessor, Qwen3VLProcessor):
                patch.setattr(processor, "get_attributes", parts)
        yield


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """Two layers of Qwen2-VL-2B's real widths."""
    config = reference.qwen2_vl_config(
        width=1536, heads=12, kv_heads=2, mlp_width=8960, layers=2, sections=(16, 24, 24),
        vision_width=1280, vision_heads=16, vision_layers=2, mlp_ratio=4,
    )  # fmt: skip
    return reference.pair(config, tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="session")
def windowed(tmp_path_factory):
    """A random Qwen2.5-VL of four small layers."""
    return reference.pair(reference.qwen2_5_vl_config(), tmp_path_factory.mktemp("2_5") / "model")


@pytest.fixture(scope="session")
def deepstack(tmp_path_factory):
    """A random Qwen3-VL of four small layers."""
    return reference.pair(reference.qwen3_vl_config(), tmp_path_factory.mktemp("3") / "model")


@pytest.fixture(scope="session", params=["tiny", "wide", "windowed", "deepstack"])
def either(request):
    """All random models in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=["tiny", "windowed", "deepstack"])
def family(request):
    """The small random model of each family in turn."""
    return request.getfixturevalue(request.param)
