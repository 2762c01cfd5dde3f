"""What every operator must pass, walked over the registry: an operator fills in a Subject and gets all of this."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from subject import Subject
from subjects import SUBJECTS, check_parameter_sums, check_quantizer, clones, gradients, has_graphs
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import tersor
from tersor._backends import running
from tersor._operator import REGISTRY

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
RAW = [(subject, name) for subject in SUBJECTS for name in subject.operators]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "name" in metafunc.fixturenames:
        metafunc.parametrize(("subject", "name"), RAW, ids=[f"{subject}-{name}" for subject, name in RAW])
    elif "subject" in metafunc.fixturenames:
        every = not metafunc.definition.get_closest_marker("differentiable")
        metafunc.parametrize("subject", [s for s in SUBJECTS if every or s.differentiable], ids=repr)


def dtypes_of(subject: Subject, run: tuple[str, str]) -> list[torch.dtype]:
    device, backend = run
    dtypes = [*subject.dtypes]
    if subject.float64 and (backend == "reference" or (device, backend) == ("cpu", "native")):
        dtypes.append(torch.float64)
    if device == "cpu" and backend == "triton":
        dtypes = [d for d in dtypes if d != torch.bfloat16]  # Triton's interpreter is wrong for it
    return dtypes


def is_floating(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


def sizes_of(subject: Subject, run: tuple[str, str]) -> list[Any]:
    """All sizes; the three smallest in Triton's interpreter, which takes seconds for a call."""
    return list(subject.sizes[:3] if run == ("cpu", "triton") else subject.sizes)


def exact_dtype(run: tuple[str, str]) -> torch.dtype:
    return torch.float64 if run[1] == "reference" or run == ("cpu", "native") else torch.float32


def test_every_operator_has_a_subject() -> None:
    covered = {name for subject in SUBJECTS for name in subject.operators}
    assert covered == set(REGISTRY), "each registered operator is named by a Subject"


def test_runs_the_backend_it_claims(subject: Subject, run: tuple[str, str]) -> None:
    for name in subject.operators:
        assert running(name, run[0]) == run[1]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_opcheck(subject: Subject, name: str, grad: bool, run: tuple[str, str]) -> None:
    if grad and REGISTRY[name].derivative is None:
        pytest.skip("it has no derivative, so that this would be the same check again")
    for dtype in dtypes_of(subject, run):
        for i, size in enumerate(sizes_of(subject, run)[: None if dtype == torch.float32 else 1]):
            arguments = subject.raw(name, size, dtype, run[0])
            if grad:
                arguments = tuple(a.requires_grad_() if is_floating(a) else a for a in arguments)
            # Tracing costs 50 times the rest. Its graph holds sizes as symbols, or as a fixed 1; without a gradient it
            # is the operator alone, whose dtypes the fake kernel's check compares.
            traced = i < 3 and (grad or dtype == torch.float32) and has_graphs(subject, run)
            torch.library.opcheck(REGISTRY[name].overload, arguments, test_utils=OPCHECKS if traced else OPCHECKS[:-1])


@pytest.mark.differentiable
def test_gradcheck(subject: Subject, run: tuple[str, str]) -> None:
    """By finite differences; a quantiser's against torch's own derivative of the straight-through formula."""
    if exact_dtype(run) != torch.float64:
        pytest.skip("this backend has no float64; its gradients are compared with the reference's instead")
    if not (subject.quantizer or subject.surrogate):
        assert torch.autograd.gradcheck(subject, subject.make(torch.float64, run[0]))
        return
    for size in sizes_of(subject, run)[:4]:
        tensors = subject.make(torch.float64, run[0], size=size)
        for e, g in zip(gradients(subject.exact, clones(tensors)), gradients(subject, tensors), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-12)


def test_error_is_within_twice_that_of_torch(subject: Subject, run: tuple[str, str]) -> None:
    """Half types: at most twice the error of torch doing the same in the same type; float32: 1e-5 of float64."""
    for dtype in dtypes_of(subject, run):
        for size in sizes_of(subject, run):
            tensors = subject.make(dtype, run[0], size=size)
            if subject.quantizer:
                check_quantizer(subject, tensors)
                continue
            exact = gradients(subject.exact, subject.widened(tensors))
            ours = gradients(subject, clones(tensors))
            plain = gradients(subject.exact, clones(tensors))
            for e, p, o in zip(exact, plain, ours, strict=True):
                assert o.dtype == dtype
                size_of = e.abs().max().clamp(min=1)
                error, allowed = ((x.double() - e).abs().max() / size_of for x in (o, p))
                floor = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, torch.finfo(dtype).eps / 2)
                bound = max(floor, 2 * allowed.item()) if dtype not in (torch.float32, torch.float64) else floor
                assert error.item() <= bound, f"{dtype} {size}: {error.item():.2e} > {bound:.2e}"


def test_autocast(subject: Subject, run: tuple[str, str]) -> None:
    if subject.inner:
        pytest.skip("it works in its tensors' dtype, whatever autocast says")
    device = run[0]
    half = torch.float16 if run == ("cpu", "triton") else torch.bfloat16
    tensors = subject.make(torch.float32, device)
    if subject.quantizer or not subject.autocast:
        with torch.autocast(device, half):
            assert torch.equal(subject(*tensors), subject(*clones(tensors)))
            assert subject(*tensors).dtype == torch.float32, "computed in float32, whatever autocast says"
        return
    with torch.autocast(device, half):
        output = subject(*tensors)
        for name in subject.operators:
            if REGISTRY[name].derivative is not None or not subject.differentiable:
                direct = REGISTRY[name].overload(*subject.raw(name, subject.sizes[0], torch.float32, device))
                assert (direct if isinstance(direct, torch.Tensor) else direct[0]).dtype == half
    assert output.dtype == half
    expected = subject(*(t.detach().to(half) for t in tensors))
    assert torch.equal(output, expected)
    if not subject.differentiable:
        return
    output.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in tensors)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(subject: Subject, dynamic: bool, run: tuple[str, str]) -> None:
    if not has_graphs(subject, run):
        pytest.skip("the same graph as of another backend")
    torch._dynamo.reset()
    recompiles: list[int] = []

    def count(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        recompiles.append(1)
        return torch._inductor.compile(graph, example) if run[0] == "cuda" else graph

    plain = torch.compile(subject, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    counted = torch.compile(subject, fullgraph=True, dynamic=dynamic, backend=count)
    for size in subject.sizes[:2]:
        tensors = subject.make(torch.float32, run[0], size=size)
        expected = gradients(subject, clones(tensors))
        for e, g in zip(expected, gradients(plain, clones(tensors)), strict=True):
            assert torch.equal(e, g), "compiled and eager run the same kernel"
        with torch.no_grad():
            assert torch.equal(counted(*tensors), expected[0])
    assert not dynamic or len(recompiles) == 1, "one graph serves both sizes"


@pytest.mark.slow
def test_compile_with_inductor(subject: Subject, run: tuple[str, str]) -> None:
    if not has_graphs(subject, run):
        pytest.skip("the same graph as of another backend")
    torch._dynamo.reset()
    compiled = torch.compile(subject, fullgraph=True)
    tensors = subject.make(torch.float32, run[0])
    for e, g in zip(gradients(subject, clones(tensors)), gradients(compiled, clones(tensors)), strict=True):
        assert torch.equal(e, g)


def test_export(subject: Subject, run: tuple[str, str]) -> None:
    class Module(torch.nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return subject(*tensors)

    tensors = subject.make(torch.float32, run[0], requires_grad=False)
    program = torch.export.export(Module(), tensors)
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(node.target) for graph in graphs for node in graph.nodes]
    if subject.in_forward:
        assert f"tersor.{subject.operators[0]}.default" in targets, "the operator stays visible in the graph"
    assert torch.equal(program.module()(*tensors), subject(*tensors))


@pytest.mark.differentiable
def test_functional_gradients(subject: Subject, run: tuple[str, str]) -> None:
    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return subject(*tensors).square().sum()

    tensors = subject.make(torch.float32, run[0])
    every = tuple(range(len(tensors)))
    expected = torch.autograd.grad(loss(*tensors), tensors)
    detached = tuple(t.detach() for t in tensors)
    for e, g in zip(expected, torch.func.grad(loss, every)(*detached), strict=True):
        torch.testing.assert_close(e, g)
    jacobian = torch.func.jacrev(lambda *t: loss(*t).view(1), every)(*detached)
    for e, g in zip(expected, jacobian, strict=True):
        torch.testing.assert_close(e, g[0])


def test_vmap(subject: Subject, run: tuple[str, str]) -> None:
    if not has_graphs(subject, run):
        pytest.skip("the same rule as of another backend, above the kernels")

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        return subject(*tensors).square().sum()

    samples = [subject.make(torch.float32, run[0], requires_grad=False) for _ in range(3)]
    every = tuple(range(len(samples[0])))
    for dim in (0, 1):
        batched = tuple(torch.stack(t, dim) for t in zip(*samples, strict=True))
        output = torch.func.vmap(subject, in_dims=dim)(*batched)
        for i, sample in enumerate(samples):
            torch.testing.assert_close(output[i], subject(*sample))
        if not subject.differentiable:
            continue
        grads = torch.func.vmap(torch.func.grad(loss, every), in_dims=dim)(*batched)
        for i, sample in enumerate(samples):
            for e, g in zip(torch.func.grad(loss, every)(*sample), grads, strict=True):
                torch.testing.assert_close(g[i], e)
    if len(every) > 1 and not subject.changes:  # the first argument shared by all
        output = torch.func.vmap(subject, in_dims=(None, *[0] * (len(every) - 1)))(
            samples[0][0], *(torch.stack(t) for t in list(zip(*samples, strict=True))[1:])
        )
        torch.testing.assert_close(output[2], subject(samples[0][0], *samples[2][1:]))


@pytest.mark.differentiable
def test_second_derivative_is_refused(subject: Subject, run: tuple[str, str]) -> None:
    if len(subject.operators) == 1:
        pytest.skip("its derivative is the identity, which may be differentiated again")
    tensors = subject.make(torch.float32, run[0])
    (first,) = torch.autograd.grad(subject(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        first.sum().backward()
    gradient = torch.func.grad(lambda *t: subject(*t).square().sum())
    with pytest.raises(RuntimeError, match="once differentiable"):
        torch.func.jacrev(gradient)(*(t.detach() for t in tensors))


def test_direct_call_has_its_gradient(subject: Subject, run: tuple[str, str]) -> None:
    """Whoever calls torch.ops.tersor.* with tensors that require a gradient gets it, or an error; never silence."""
    for name in subject.operators:
        arguments = subject.raw(name, subject.sizes[0], torch.float32, run[0])
        tensors = [a.requires_grad_() for a in arguments if is_floating(a)]
        if REGISTRY[name].derivative is None and "!" in REGISTRY[name].schema:
            with pytest.raises(RuntimeError, match="changes its arguments in place"):
                REGISTRY[name].overload(*arguments)
            continue
        result = REGISTRY[name].overload(*arguments)
        first = result if isinstance(result, torch.Tensor) else result[0]
        if not first.is_floating_point() or not tensors:
            assert not first.requires_grad, "places and bits carry no gradient"
        elif REGISTRY[name].derivative is None:
            reason = "once differentiable" if name.endswith("_backward") else "has no derivative"
            with pytest.raises(RuntimeError, match=reason):
                first.sum().backward()
        else:
            first.sum().backward()
            assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in tensors[:1])


def test_checkpointing(subject: Subject, run: tuple[str, str]) -> None:
    tensors = subject.make(torch.float32, run[0])
    expected = gradients(subject, clones(tensors))
    keep = [getattr(torch.ops.tersor, subject.operators[0]).default]
    contexts: list[Callable[[], Any] | None] = [None, lambda: create_selective_checkpoint_contexts(keep)]
    for context in contexts:
        extra = {"context_fn": context} if context else {}
        result = gradients(lambda *t, e=extra: checkpoint(subject, *t, use_reentrant=False, **e), clones(tensors))
        assert all(torch.equal(e, r) for e, r in zip(expected, result, strict=True))


def test_same_bits_every_time(subject: Subject, run: tuple[str, str]) -> None:
    """From run to run, and for any number of threads."""
    threads = torch.get_num_threads()
    try:
        for size in sizes_of(subject, run):
            tensors = subject.make(torch.float32, run[0], size=size)
            results = []
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                results.append(gradients(subject, clones(tensors)))
            if run[1] != "reference":  # torch's own sums may depend on the threads
                ours = slice(None if subject.in_forward else 1, None)
                for result in results[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(results[0][ours], result[ours], strict=True))
    finally:
        torch.set_num_threads(threads)


def test_any_strides(subject: Subject, run: tuple[str, str]) -> None:
    tensors = subject.make(torch.float32, run[0])
    expected = gradients(subject, clones(tensors))

    def strided(t: torch.Tensor) -> list[torch.Tensor]:
        if t.dim() < 2:
            return [t.detach(), t.detach().repeat_interleave(2)[::2], t.detach()]
        last_first = t.detach().movedim(-1, 0).contiguous().movedim(0, -1)
        gaps = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t.detach())
        backwards = t.detach().transpose(0, 1).contiguous().transpose(0, 1)
        return [last_first, gaps, backwards]

    for layout in zip(*map(strided, tensors), strict=True):
        inputs = tuple(t.requires_grad_(subject.differentiable) for t in layout)
        for e, g in zip(expected, gradients(subject, inputs), strict=True):
            size = max(1.0, e.abs().max().item())  # torch sums in an order that depends on the strides
            torch.testing.assert_close(g, e, atol=1e-6 * size, rtol=1e-5)


@pytest.mark.differentiable
def test_any_incoming_gradient(subject: Subject, run: tuple[str, str]) -> None:
    """Expanded (from sum), split, channels-first and every-other-element gradients."""
    tensors = subject.make(torch.float32, run[0])
    output = subject(*tensors)
    dense = torch.randn_like(output)
    layouts = {
        "expanded": torch.ones((), device=output.device).expand_as(output),
        "channels first": dense.movedim(-1, 1).contiguous().movedim(1, -1),
        "strided": torch.stack([dense, dense], dim=-1)[..., 0],
        "split": torch.cat([dense, dense], dim=-1).split(dense.shape[-1], dim=-1)[0],
    }
    for name, gradient in layouts.items():
        expected = torch.autograd.grad(output, tensors, gradient.contiguous(), retain_graph=True)
        given = torch.autograd.grad(output, tensors, gradient, retain_graph=True)
        for i, (e, g) in enumerate(zip(expected, given, strict=True)):
            if i >= subject.data and run[1] == "reference":  # torch's own sums depend on the layout
                torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-4)
            else:
                assert torch.equal(e, g), name


@pytest.mark.differentiable
def test_some_inputs_without_gradient(subject: Subject, run: tuple[str, str]) -> None:
    tensors = subject.make(torch.float32, run[0])
    expected = gradients(subject, clones(tensors))[1:]
    for i in range(len(tensors)):
        some = tuple(t.detach().clone().requires_grad_(i == j) for j, t in enumerate(tensors))
        output = subject(*some)
        weights = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
        (only,) = torch.autograd.grad(output, some[i], weights)
        assert torch.equal(only, expected[i])
    assert not subject(*(t.detach() for t in tensors)).requires_grad
    with torch.inference_mode():
        subject(*(t.detach() for t in tensors))


def test_inputs_are_left_alone(subject: Subject, run: tuple[str, str]) -> None:
    tensors = subject.make(torch.float32, run[0])
    before = copy.deepcopy([t.detach() for t in tensors])
    gradients(subject, tensors)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values(subject: Subject, value: float, run: tuple[str, str]) -> None:
    """Non-finite results appear just where plain torch has them, and finite ones stay right."""
    # A quantiser refuses such parameters, and packing such weights.
    for which in range(1 if subject.quantizer or subject.skips else len(subject.make(torch.float32, run[0]))):
        tensors = subject.make(torch.float32, run[0], size=sizes_of(subject, run)[-1])
        with torch.no_grad():
            tensors[which].view(-1)[tensors[which].numel() // 2] = value
        if subject.quantizer:
            _compare_with_reference(subject, tensors)
            continue
        for e, o in zip(gradients(subject.exact, clones(tensors)), gradients(subject, clones(tensors)), strict=True):
            finite = e.isfinite()
            assert (
                torch.equal(o.isfinite() | finite, o.isfinite()) if subject.skips else torch.equal(o.isfinite(), finite)
            )
            torch.testing.assert_close(o[finite], e[finite], atol=1e-4, rtol=1e-4)


def _compare_with_reference(subject: Subject, tensors: tuple[torch.Tensor, ...]) -> None:
    """Outputs and the first input's gradient bit by bit, sums closely; or the same refusal."""
    with tersor.use_backend("reference"):
        try:
            expected = gradients(subject, clones(tensors))
        except ValueError:
            expected = None
    if expected is None:
        with pytest.raises(ValueError, match=r"finite|NaN"):
            subject(*tensors)
        return
    given = gradients(subject, clones(tensors))
    for e, g in zip(expected[: 1 + subject.data], given, strict=False):
        torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)
    if subject.differentiable and all(t.isfinite().all() for t in tensors):
        check_parameter_sums(subject, tensors, given[1 + subject.data :])
        return  # held to float64, from which the reference's own float32 sums may be further away
    for e, g in zip(expected[1 + subject.data :], given[1 + subject.data :], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_poisoned_memory(subject: Subject, run: tuple[str, str]) -> None:
    """Every element of every output is written: uninitialised memory is filled with NaN first."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for size in sizes_of(subject, run):
            for result in gradients(subject, subject.make(torch.float32, run[0], size=size)):
                assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def test_bad_tensors(subject: Subject) -> None:
    """What is wrong for every operator; each one's own conditions are in its own test file."""
    if subject.inner:
        pytest.skip("the class that calls it has checked its arguments")
    tensors = subject.make(torch.float32, "cpu", requires_grad=False)
    with pytest.raises(TypeError, match=r"must be float16, bfloat16, float32 or float64, got torch\.int64"):
        subject(*(t.long() for t in tensors))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got list"):
        subject([1.0], *tensors[1:])
    with pytest.raises(TypeError, match="strided"):
        subject(tensors[0].to_sparse(), *tensors[1:])
    if subject.quantizer:
        if len(tensors) > 1:
            with pytest.raises(ValueError, match=r"must be on the device of input|must have the shape of input"):
                subject(*tensors[:-1], tensors[-1].to("meta"))
        return
    with pytest.raises(ValueError, match="got shape"):
        subject(tensors[0][0], *(t[0] for t in tensors[1:]))
    if not subject.alike:
        return
    if len(tensors) > 1:
        with pytest.raises(TypeError, match="must have the dtype of"):
            subject(tensors[0].double(), *tensors[1:])
        with pytest.raises(ValueError, match="must have the shape of"):
            subject(*tensors[:-1], tensors[-1][:, :0])
        with pytest.raises(ValueError, match="must be on the device of"):
            subject(*tensors[:-1], tensors[-1].to("meta"))


def test_meta_tensors(subject: Subject) -> None:
    tensors = subject.make(torch.float32, "cpu", requires_grad=False)
    expected, meta = subject(*tensors), subject(*(t.to("meta") for t in tensors))
    assert (meta.shape, meta.dtype, meta.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_backends_agree(subject: Subject) -> None:
    tensors = subject.make(torch.float32, "cpu", requires_grad=False)
    if subject.quantizer:
        for dtype in subject.dtypes:
            for size in subject.sizes:
                _compare_with_reference(subject, subject.make(dtype, "cpu", size=size))
        return
    with tersor.use_backend("reference"):
        expected = subject(*tensors)
    torch.testing.assert_close(subject(*tensors), expected, atol=1e-6, rtol=1e-5)


class TestCuda:
    """What only a GPU can show; on one, both GPU backends go through it."""

    pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

    @pytest.fixture(params=["native", "triton"], autouse=True)
    def gpu_backend(self, request: pytest.FixtureRequest) -> Any:
        with tersor.use_backend(request.param):
            yield request.param

    def test_graph_capture(self, subject: Subject) -> None:
        tensors = subject.make(torch.float16, "cuda")
        expected = gradients(subject, clones(tensors))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gradients(subject, tensors)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gradients(subject, tensors)
        for result in captured:
            result.detach().fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(e, c) for e, c in zip(expected, captured, strict=True))

    def test_side_stream(self, subject: Subject) -> None:
        tensors = subject.make(torch.float16, "cuda", requires_grad=False)
        expected = subject(*tensors)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # if the kernel ran on another stream it would read before the copy
            copies = tuple(torch.empty_like(t).copy_(t) for t in tensors)
            output = subject(*copies)
        side.synchronize()
        assert torch.equal(output, expected)

    def test_no_host_synchronisation(self, subject: Subject) -> None:
        tensors = subject.make(torch.float16, "cuda")
        gradients(subject, clones(tensors))
        torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(subject, tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")
