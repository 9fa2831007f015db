"""Number formats that training uses on a CPU."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install nvembed-deploy[train]")

from nvembed_deploy.training.device import bf16_is_fast  # noqa: E402


@pytest.mark.parametrize(
    ("capability", "gpu", "fast"),
    [("AVX2", False, False), ("DEFAULT", False, False), ("AVX512", False, True), ("AVX2", True, True)],
)
def test_bf16_is_used_only_on_cpus_that_multiply_it(
    monkeypatch: pytest.MonkeyPatch, capability: str, gpu: bool, fast: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert bf16_is_fast() is fast
