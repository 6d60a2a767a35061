"""A stage of training compiled for TPUs that are not here, and what is read from the program."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from puma_jax.errors import ConfigError
from puma_jax.parallel.mesh import MeshConfig, make_mesh
from puma_jax.train import load_config

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "configs/puma.py"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="compiles for TPUs: pip install -e '.[tpu]'",
)


@pytest.fixture(scope="module")
def aot_check():
    sys.path.insert(0, str(ROOT / "launch"))  # where a script finds its neighbours
    spec = importlib.util.spec_from_file_location("aot_check", ROOT / "launch/aot_check.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot_check"] = module  # where dataclasses look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["aot_check"], sys.path[0]


@needs_libtpu
def test_a_small_recipe_compiles_for_four_chips_with_splash_attention(tiny):
    command = [sys.executable, "launch/aot_check.py", "--config", str(RECIPE), "--stage", "distil"]
    command += ["--topology", "v5e:2x2", "--model", str(tiny.folder), "--mesh.fsdp", "2"]
    command += ["--stages.distil.keep-layers", "2", "--stages.distil.lora.rank", "4"]
    command += ["--stages.distil.grad-cache-chunks", "1", "--pairs", "16"]
    command += ["--visual-tokens", "30", "--text-tokens", "50"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "data 2 × fsdp 2 × tensor 1, 1 chunks of 16 rows × 256 tokens and 16 rows × 256 patches"
        in done.stdout
    )
    assert re.search(r"arguments 0\.\d\d GB, .* of 16 GB", done.stdout, re.DOTALL)
    # The tower's 2 blocks, once for student and teacher; the teacher's 4 layers; the student's 2
    # layers forward, again, and backward, which takes two kernels.
    assert "in addition 14 runs of Pallas kernels" in done.stdout, done.stdout
    assert re.search(r"all-gather on each chip: \d\.\d\d GB in [1-9]", done.stdout)


@needs_libtpu
def test_loops_count_as_often_as_they_run(aot_check, monkeypatch):
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    config = dataclasses.replace(load_config(RECIPE)(), mesh=MeshConfig(fsdp=4, data=1))
    kind, mesh = aot_check.tpu_mesh("v5e-4", config)
    assert (kind, mesh.size) == ("v5e", 4)
    layers, rows, width = 6, 1024, 256

    def spread(shape, *axes):
        return jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, P(*axes)))

    def run(x, kernels):
        def layer(x, kernel):
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("fsdp")))
            return jax.nn.silu(x @ kernel), None

        return jax.lax.scan(layer, x, kernels)[0]

    arguments = spread((rows, width), "fsdp"), spread((layers, width, width), None, "fsdp")
    program = aot_check.read_program(jax.jit(run).lower(*arguments).compile().as_text())
    assert program.flops == layers * 2 * (rows / 4) * width * width
    assert program.moved == {"all-gather": layers * width * width * 2}
    assert program.collectives == {"all-gather": layers}
    assert program.kernels == 0


def test_what_does_not_fit_is_told(aot_check, capsys):
    memory = SimpleNamespace(
        argument_size_in_bytes=9e9,
        output_size_in_bytes=2e9,
        alias_size_in_bytes=2e9,
        temp_size_in_bytes=8e9,
        generated_code_size_in_bytes=0,
    )
    compiled = SimpleNamespace(memory_analysis=lambda: memory)
    assert not aot_check.report_memory(compiled, aot_check.CHIPS["v5e"])
    assert "17.00 of 16 GB, 106%" in capsys.readouterr().out
    assert aot_check.report_memory(compiled, aot_check.CHIPS["v5p"])


def test_shapes_of_every_stage(aot_check):
    config = load_config(RECIPE)()
    assert aot_check.base_model(config, "distil").decoder.layers == 28
    assert aot_check.base_model(config, "mac").kept_layers == tuple(range(12))
    with pytest.raises(ConfigError, match=r"^--stage sum is not one of distil, mac$"):
        aot_check.base_model(config, "sum")
    with pytest.raises(ConfigError, match=r"^elsewhere is neither a folder nor one of Qwen"):
        aot_check.base_model(load_config(RECIPE)("elsewhere"), "mac")
    with pytest.raises(ConfigError, match=r"^--topology v5e-7 is not one of v5e-4, "):
        aot_check.tpu_mesh("v5e-7", config)


@pytest.mark.parametrize(
    ("model", "weights"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct", 0.641e9),
        ("Qwen/Qwen2.5-VL-3B-Instruct", 0.637e9),
        ("Qwen/Qwen3-VL-2B-Instruct", 0.328e9),
        ("Qwen/Qwen3-VL-8B-Instruct", 0.452e9),
    ],
)
def test_the_step_has_the_shapes_of_the_recipe(aot_check, model, weights):
    config = load_config(RECIPE)(model)
    settings = aot_check.Settings(RECIPE, "mac", "v5e-16")
    lowered = aot_check.lower(settings, config, make_mesh(MeshConfig(data=1, fsdp=8)))
    assert aot_check._parameters(lowered.model)[1] == pytest.approx(weights, rel=0.02)
    assert lowered.model.decoder.layers == 12
    assert lowered.shape.rows % 8 == 0
    assert lowered.shape.length % 128 == 0
    assert aot_check.model_flops(settings, config.stages["mac"], lowered) > 1e15
