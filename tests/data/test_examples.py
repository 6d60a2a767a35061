"""Records can be read by many threads from the first one on."""

import subprocess
import sys

READ = """
import time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from puma_jax.data import examples

record = examples.Record("a", 1, None, 0, 0, np.arange(3, dtype=np.int32), 2, np.zeros(0, np.int32))

def read_while_another_imports(number):
    time.sleep(number / 50)  # importing takes about a second
    return examples.from_example(examples.to_example(record)).id

with ThreadPoolExecutor(64) as pool:
    print({*pool.map(read_while_another_imports, range(64))})
"""


def test_threads_that_read_while_another_imports_do_not_wait_for_each_other():
    done = subprocess.run(
        [sys.executable, "-c", READ], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "{'a'}\n"
