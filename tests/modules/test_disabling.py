"""Where adapters are disabled: context, threads, backward, and not in copies of the model."""

import _thread
import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from randlora import disabled
from randlora.model.index import adapted_modules
from randlora.modules.disabling import _SCOPES_LOCK
from tests.support.moving import ROWS, adapted, dumped


def test_the_garbage_collector_may_leave_a_scope_in_the_thread_that_holds_the_lock():
    with _SCOPES_LOCK:
        again = _SCOPES_LOCK.acquire(blocking=False)  # else leaving would wait for its own thread
        if again:
            _SCOPES_LOCK.release()
    assert again
    model = adapted()
    want, abandoned = model(ROWS), disabled(model)
    abandoned.__enter__()
    before = {m: m._randlora.disabled_scopes for m in adapted_modules(model).values()}
    with _SCOPES_LOCK:
        abandoned.__exit__(None, None, None)
        for module, scopes in before.items():
            module._randlora.disabled_scopes = scopes  # as the code that was interrupted would
    assert torch.equal(model(ROWS), want)
    outputs, done = [], threading.Event()
    _thread.start_new_thread(lambda: (outputs.append(model(ROWS)), done.set()), ())
    assert done.wait(60)  # this thread knows no context, so it looks at the scopes of all
    assert torch.equal(outputs[0], want)
    with disabled(model):
        pass
    assert not any(m._randlora.disabled_scopes for m in before)


def test_disabled_may_be_left_in_any_order():
    model = adapted(modules_to_save="1")
    with disabled(model):
        plain = model(ROWS)
    want = model(ROWS)
    one, other = disabled(model), disabled(model)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert torch.equal(model(ROWS), plain)
    other.__exit__(None, None, None)
    assert torch.equal(model(ROWS), want)

    def twice():
        with disabled(model):
            yield model(ROWS)
            yield model(ROWS)

    first, second = twice(), twice()
    next(first)
    next(second)
    first.close()
    assert torch.equal(next(second), plain)
    second.close()
    assert torch.equal(model(ROWS), want)


def test_disabled_left_in_another_thread_is_left():
    model = adapted()
    want = model(ROWS)
    context = disabled(model)
    context.__enter__()
    run(lambda: context.__exit__(None, None, None))
    assert torch.equal(model(ROWS), want)


def run(what):
    results = []
    thread = threading.Thread(target=lambda: results.append(what()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_disabled_holds_in_its_context_and_goes_into_no_copy():
    model = adapted(modules_to_save="1")
    want = model(ROWS)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with disabled(model):
        plain = model(ROWS)
        assert not torch.equal(plain, want)
        assert torch.equal(run(lambda: model(ROWS)), want)
        with torch.no_grad():
            assert torch.equal(compiled(ROWS), plain)
            assert torch.equal(run(lambda: torch.no_grad()(compiled)(ROWS)), want)
        copies = copy.deepcopy(model), torch.load(dumped(model), weights_only=False)
        assert all(torch.equal(copied(ROWS), want) for copied in copies)
    assert all(torch.equal(copied(ROWS), want) for copied in copies)
    with torch.no_grad():
        assert torch.equal(compiled(ROWS), want)

    async def task(wait, within):
        await asyncio.sleep(wait)
        if not within:
            return model(ROWS)
        with disabled(model):
            await asyncio.sleep(0)
            return model(ROWS)

    async def both():
        return await asyncio.gather(task(0, True), task(0, False), task(0, True))

    outputs = asyncio.run(both())
    assert [torch.equal(y, plain) for y in outputs] == [True, False, True]
    assert torch.equal(outputs[1], want)


def test_a_hook_of_backward_may_look_at_the_plain_model():
    model, seen = adapted(), []

    def hook(parameter):
        with disabled(model), torch.no_grad():
            seen.append(model(ROWS))

    model[0].randlora_gamma.register_post_accumulate_grad_hook(hook)
    model(ROWS).sum().backward()
    with disabled(model):
        assert torch.equal(seen[0], model(ROWS))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_disabled_is_so_in_threads_that_are_not_pythons(reentrant):
    model = adapted()
    x = ROWS.clone().requires_grad_()
    model(x)
    with disabled(model):
        (want,) = torch.autograd.grad(model(x).sum(), x)
        y = checkpoint(model, x, use_reentrant=reentrant)
        # Like the thread that autograd uses for the backward of a device.
        done = threading.Event()
        _thread.start_new_thread(lambda: (y.sum().backward(), done.set()), ())
        assert done.wait(60)
    assert torch.equal(x.grad, want)


def test_disabled_in_several_threads_and_interleaved_generators_ends_enabled():
    model, threads, turns = adapted(modules_to_save="1"), 4, 10
    want = model(ROWS)
    with disabled(model):
        plain = model(ROWS)
    together = threading.Barrier(threads + 1, timeout=60)
    others = [None] * threads

    def inside():
        with disabled(model):
            yield torch.equal(model(ROWS), plain)

    def work(thread):
        right = []
        for turn in range(turns):
            one, other = inside(), inside()
            right += [next(one), next(other)]
            others[thread] = other
            together.wait()  # all scopes are open
            together.wait()
            for scope in (one, others[thread - 1])[:: 1 if turn % 2 else -1]:
                scope.close()  # one of them was entered by another thread
            together.wait()  # all are closed
            right.append(torch.equal(model(ROWS), want))
        return all(right)

    with ThreadPoolExecutor(threads) as pool:
        working = [pool.submit(work, thread) for thread in range(threads)]
        enabled = []
        for _ in range(turns):
            together.wait()
            enabled.append(torch.equal(model(ROWS), want))
            together.wait()
            together.wait()
            enabled.append(torch.equal(model(ROWS), want))
        assert all(enabled)
        assert all(one.result() for one in working)
    assert not any(m._randlora.disabled_scopes for m in adapted_modules(model).values())
