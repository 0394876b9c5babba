"""Build the API page without PyTorch: what is not installed is mocked, and `minigen` is read from this repository."""
import importlib.util
import sys
from pathlib import Path

HEAVY = ("torch", "torchvision", "numpy", "scipy", "matplotlib", "PIL", "ipywidgets", "accelerate", "torchmetrics",
         "torch_fidelity", "filelock", "safetensors", "tqdm", "tyro")


def missing():
    return [name for name in HEAVY if importlib.util.find_spec(name) is None]


def setup(app):
    sys.path.insert(0, str(Path(app.confdir)))
    app.connect("config-inited", lambda app, config: setattr(config, "autodoc_mock_imports", missing()))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
