"""The parity gate: compares the graphs and plan of a bundle with the reference, as far as this machine runs them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nvembed_deploy.backends.base import Backend
from nvembed_deploy.backends.cuda import CudaRuntime
from nvembed_deploy.backends.ort import CPU_NOTES, OrtBackend
from nvembed_deploy.backends.trt import TrtBackend
from nvembed_deploy.bundle.manifest import CPU_GRAPH, GRAPH, PlanInfo
from nvembed_deploy.bundle.parity_report import ParityReport
from nvembed_deploy.console import detail, echo, program, step
from nvembed_deploy.errors import DeviceMismatchError, MissingExtra
from nvembed_deploy.model.config import ModelConfig
from nvembed_deploy.parity.compare import compare, require_mask, require_passed
from nvembed_deploy.parity.probes import ReferenceOutputs
from nvembed_deploy.spec import Precision, Shape
from nvembed_deploy.tokenization import TextEncoder


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Compares candidates with the reference outputs and refuses those outside the tolerance."""

    reference: ReferenceOutputs
    text: TextEncoder
    model: ModelConfig
    precision: Precision
    max_shape: Shape

    def graphs(self, folder: Path) -> list[ParityReport]:
        """Checks the graphs that ONNX Runtime can run: the engine's graph, executed as written, and the CPU graph.

        Returns:
            A report for each graph.

        Raises:
            ParityError: A graph is outside the tolerance.
            MaskError: A graph has another attention mask than the model.
        """
        reports = []
        if self.precision.runs_as_written:
            with step("comparing ONNX with PyTorch"):
                reports.append(self._check(OrtBackend(folder / GRAPH, as_written=self.precision.quantized)))
        if self.precision.has_cpu_graph:
            with step("comparing the CPU graph with PyTorch"):
                reports.append(self._check(OrtBackend(folder / CPU_GRAPH, note=CPU_NOTES[self.precision])))
        return reports

    def plan(self, content: memoryview, plan_info: PlanInfo, graph: Path) -> list[ParityReport]:
        """Checks a plan if this machine has a GPU that runs it; otherwise prints why the plan was not run.

        Returns:
            One report, or none if the plan was not run.

        Raises:
            ParityError: The plan is outside the tolerance.
            MaskError: The plan has another attention mask than the model.
            EngineError: TensorRT cannot load or run the plan.
        """
        try:
            cuda = CudaRuntime.load()
            device = cuda.device(0)
            dim = self.model.hidden_size
            candidate = TrtBackend(content, plan_info, dimension=dim, device=device, cuda=cuda, graph=graph)
        except (DeviceMismatchError, MissingExtra) as err:
            echo(f"  the plan was not run: {err}; to check it on its GPU: {program('check')} BUNDLE --device cuda")
            return []
        with step("comparing the plan with PyTorch"):
            return [self._check(candidate)]

    def _check(self, candidate: Backend) -> ParityReport:
        # First, because the vectors may not reveal a wrong mask.
        require_mask(candidate, self.text, self.model.mask, max_shape=self.max_shape)
        report = compare(self.reference, candidate, self.text, precision=self.precision, max_shape=self.max_shape)
        detail(f"  {report.summary()}")
        return require_passed(report)


def verdict(reports: Sequence[ParityReport], plan_info: PlanInfo | None) -> str:
    """Summarizes the reports of a bundle, distinguishing a plan that was run from one whose graph was compared."""
    if not reports:
        return "parity NOT checked: the bundle was exported with --no-parity"
    if plan_info is None or any(plan_info.runtime in report.candidate for report in reports):
        return "parity passed"
    return "parity of the graph passed, the plan was not run"


def closeness(reports: Sequence[ParityReport]) -> str:
    """Says how close the furthest of the compared graphs and plans is to the reference; empty without reports."""
    if not reports:
        return ""
    furthest = min(reports, key=lambda report: report.min_cosine)
    return (
        f" (lowest cosine to PyTorch {furthest.min_cosine:.7f}, at least {furthest.tolerance.min_cosine} required; "
        f"{furthest.texts} texts up to {furthest.longest_tokens} tokens)"
    )
