"""Makes a plain `pytest --nbval chapters/` run the chapters with this interpreter, on the CPU, from any folder."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
# threads that wait must sleep, not spin: spinning makes two processes on two cores a hundred times slower
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True)
def _same_start(request):
    """Every test starts from one random state, so that none depends on those before it, and with one thread.

    Small networks gain nothing from more threads, and on a busy machine those that wait cost a factor of ten.
    """
    if "torch" in sys.modules and hasattr(request, "function"):
        sys.modules["torch"].manual_seed(0)
        sys.modules["torch"].set_num_threads(1)


def pytest_configure(config):
    # chapters run in chapters/: find minigen even where it is not installed
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    opt = config.option
    if not (getattr(opt, "nbval", False) or getattr(opt, "nbval_lax", False)):
        return  # nbval is absent, or not asked for
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stored outputs were made on a CPU
    if not opt.nbval_kernel_name:
        opt.nbval_current_env = True
    if not opt.nbval_sanitize_with:
        opt.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")
    opt.nbval_cell_timeout = min(opt.nbval_cell_timeout, 900)
