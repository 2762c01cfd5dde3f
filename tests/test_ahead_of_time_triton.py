"""Every Triton kernel compiles for sm_80 and sm_90 without a GPU, spills no register and loads whole vectors."""

import os
import types

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 replaces the compiler by the interpreter", allow_module_level=True)

import ahead_of_time_triton as ahead
import triton
import triton.language as tl

MODULES = ahead.modules()
CASES = [(case, capability) for m in MODULES for case in ahead.cases(m) for capability in ahead.CAPABILITIES]


@pytest.fixture(scope="module")
def reports(request):
    """The reports so far, printed as a table when all are in."""
    found = []
    yield found
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        plugins.getplugin("terminalreporter").write_line("\n" + ahead.table(found))


@pytest.mark.parametrize(
    ("case", "capability"), CASES, ids=[f"{case.name}-{case.label}-sm_{c}".replace(" ", "_") for case, c in CASES]
)
def test_compiles_without_spills_and_with_vector_loads(case, capability, reports, tmp_path):
    report = ahead.compile_case(case, capability, tmp_path)
    reports.append(report)
    assert report.complaints() == [], ahead.table([report])


def test_every_kernel_has_a_case():
    assert MODULES
    assert CASES
    assert ahead.without_case(MODULES) == []


@triton.jit
def _scalar_copy(source, target, stride, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE) * stride
    tl.store(target + place, tl.load(source + place))


def test_the_checks_notice(tmp_path):
    """A kernel without a case, scalar loads, and a spill are each refused."""
    module = types.ModuleType(__name__)
    module._scalar_copy = _scalar_copy
    assert ahead.without_case([module]) == [f"{__name__}._scalar_copy"]

    signature = {"source": "*fp16:16", "target": "*fp16:16", "stride": "i32"}
    case = ahead.Case(_scalar_copy, "fp16", signature, {"SIZE": 1024}, {"enable_fp_fusion": False})
    report = ahead.compile_case(case, 80, tmp_path)
    assert (report.load, report.store) == (2, 2)
    assert len(report.complaints()) == 2
    assert report._replace(load=16, wide_share=1.0).complaints() == []
    assert report._replace(load=16, wide_share=1.0, spills=8).complaints() == ["8 bytes of registers spilled"]
