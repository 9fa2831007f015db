"""What this machine has."""

import importlib.machinery
import importlib.metadata
import sys
from types import ModuleType

import pytest

from nvembed_deploy.system import installed_versions


def test_versions_of_what_is_there_under_whatever_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu is the module onnxruntime, and no distribution of that name."""
    module = ModuleType("only_a_module")
    module.__version__ = "1.2.3"
    module.__spec__ = importlib.machinery.ModuleSpec("only_a_module", None)
    monkeypatch.setitem(sys.modules, "only_a_module", module)
    found = installed_versions(("numpy", "only_a_module", "not-installed"))
    assert found == {"numpy": importlib.metadata.version("numpy"), "only_a_module": "1.2.3"}
