"""Damaged model folders: only declared errors come out, before any weight is sized by them."""

import json

import pytest

from puma_jax.data.prompts import Processor
from puma_jax.data.tokenizer import load_tokenizer
from puma_jax.embedder import Embedder
from puma_jax.model.hf import open_checkpoint, read_config
from tests import reference
from tests.fuzz import Target, check_only_declared_errors


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A folder that this package saved, whose files are damaged in turn."""
    folder = tmp_path_factory.mktemp("hostile") / "model"
    Embedder.load(tiny.folder, dtype=None).keep_layers(2).save(folder, max_shard_bytes=100_000)
    reference.image_processor(tiny.config.images).save_pretrained(folder)
    processor = {"image_processor": json.loads((folder / "preprocessor_config.json").read_bytes())}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def check_file(folder, name, read, count=200):
    target = Target(folder / name, lambda: read(folder))
    assert check_only_declared_errors(target, count=count).declared > count // 5


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_damaged_config_is_read_or_refused_in_one_line(folder, name):
    check_file(folder, name, open_checkpoint)


def test_damaged_settings_of_images_are_read_or_refused_in_one_line(folder, tmp_path):
    check_file(folder, "processor_config.json", read_config)
    (folder / "processor_config.json").rename(tmp_path / "processor_config.json")
    check_file(folder, "preprocessor_config.json", read_config)


@pytest.mark.filterwarnings("ignore")  # transformers warns of much before it refuses
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_read_or_refused_in_one_line(folder, name):
    def read(folder):
        config, _ = read_config(folder)
        Processor(load_tokenizer(folder), config).item("An été, and <|im_end|>.")

    check_file(folder, name, read)
