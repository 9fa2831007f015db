"""Information about this machine and its packages."""

import importlib.machinery
import importlib.metadata
import sys
from types import ModuleType

import pytest

from nvembed_deploy.system import installed_versions


def test_versions_of_modules_from_packages_of_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu provides the module onnxruntime without a distribution of that name."""
    module = ModuleType("only_a_module")
    module.__version__ = "1.2.3"
    module.__spec__ = importlib.machinery.ModuleSpec("only_a_module", None, origin="only_a_module.py")
    monkeypatch.setitem(sys.modules, "only_a_module", module)
    versions = installed_versions(("numpy", "only_a_module", "not-installed"))
    assert versions == {"numpy": importlib.metadata.version("numpy"), "only_a_module": "1.2.3"}
