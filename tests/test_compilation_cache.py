"""Programs that were compiled once are read by the next process, unless JAX is told otherwise."""

import os
import subprocess
import sys

COMPILE = """
import jax
from puma_jax import compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
compilation_cache.enable()
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8))).block_until_ready()
print(hits.count("/jax/compilation_cache/cache_hits") > 0, jax.config.jax_compilation_cache_dir)
"""


def said(tmp_path, **settings):
    without = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    always = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XDG_CACHE_HOME": str(tmp_path)}
    command, environment = [sys.executable, "-c", COMPILE], {**without, **always, **settings}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout.split()


def test_a_second_process_compiles_nothing_again(tmp_path):
    assert said(tmp_path)[0] == "False"
    hit, folder = said(tmp_path)
    assert hit == "True"
    assert folder.startswith(str(tmp_path / "puma_jax/programs"))


def test_the_variables_of_jax_come_first(tmp_path):
    elsewhere = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "mine")}
    assert said(tmp_path, **elsewhere)[1] == str(tmp_path / "mine")
    for _ in range(2):
        assert said(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[0] == "False"


def test_without_a_folder_to_write_programs_are_compiled_each_time(tmp_path):
    (tmp_path / "puma_jax").write_text("in the way")
    assert said(tmp_path) == ["False", "None"]
