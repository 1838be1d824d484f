"""The compiler's forecast, of a text written by hand: sums, loops, what is hidden, and absent fields."""

import json

import pytest

from babel_jax.cli import main
from babel_jax.hardware import CHIPS
from babel_jax.tpu.forecast import Estimate, Kind, clock_of, forecast_of, kernels_table
from babel_jax.tpu.hlo import Program

CHIP = CHIPS["v5e"]
CLOCK = clock_of(CHIP)


def estimated(cycles):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'


# A loop of 3 iterations: a gather starts, a product of 6,000 cycles runs beside it, then the loop waits for
# the gather's end. After the loop come an all-reduce for which the program waits, a copy and a kernel.
TEXT = f"""HloModule jit_step, is_scheduled=true

FileNames
1 "/site/babel_jax/model/layers.py"
2 "/site/jax/lax.py"

FunctionNames
1 "project"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=62 end_line=62 column=1 end_column=2}}
2 {{file_name_id=2 function_name_id=1 line=9 end_line=9 column=1 end_column=2}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}

%product (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {{
  %a = bf16[8,8]{{1,0}} parameter(0)
  %b = bf16[8,8]{{1,0}} parameter(1)
  ROOT %dot = bf16[8,8]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}

%start (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {{
  %p = bf16[8,128]{{1,0}} parameter(0)
  %all-gather.1 = bf16[32,128]{{1,0}} all-gather(%p), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, frontend_attributes={{chain_id="7"}}
  ROOT %begin = (bf16[8,128]{{1,0}}, bf16[32,128]{{1,0}}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}}

%done (q: bf16[8,128]) -> bf16[32,128] {{
  %q = bf16[8,128]{{1,0}} parameter(0)
  %all-gather.2 = bf16[32,128]{{1,0}} all-gather(%q), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, frontend_attributes={{chain_id="7"}}
  ROOT %end = bf16[32,128]{{1,0}} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}}

%body (state: (s32[], bf16[8,128], bf16[8,8])) -> (s32[], bf16[8,128], bf16[8,8]) {{
  %state = (s32[], bf16[8,128]{{1,0}}, bf16[8,8]{{1,0}}) parameter(0)
  %mine = bf16[8,128]{{1,0}} get-tuple-element(%state), index=1
  %square = bf16[8,8]{{1,0}} get-tuple-element(%state), index=2
  %begun = (bf16[8,128]{{1,0}}, bf16[32,128]{{1,0}}) fusion(%mine), kind=kCustom, calls=%start
  %layer = bf16[8,8]{{1,0}} fusion(%square, %square), kind=kOutput, calls=%product, metadata={{op_name="jit(step)/mlp/dot_general" stack_frame_id=2}}, {estimated(6000)}
  %whole = bf16[32,128]{{1,0}} fusion(%mine), kind=kCustom, calls=%done
  %ahead = (bf16[8,8]{{1,0}}, bf16[8,8]{{1,0}}) copy-start(%square)
  ROOT %next = (s32[], bf16[8,128]{{1,0}}, bf16[8,8]{{1,0}}) tuple(%state, %mine, %layer)
}}

%condition (state.1: (s32[], bf16[8,128], bf16[8,8])) -> pred[] {{
  %state.1 = (s32[], bf16[8,128]{{1,0}}, bf16[8,8]{{1,0}}) parameter(0)
  %limit = s32[] constant(3)
  ROOT %less = pred[] compare(%state.1, %limit), direction=LT
}}

ENTRY %main (x: bf16[8,128]) -> f32[1024] {{
  %x = bf16[8,128]{{1,0}} parameter(0)
  %loop = (s32[], bf16[8,128]{{1,0}}, bf16[8,8]{{1,0}}) while(%x), condition=%condition, body=%body
  %norm = f32[1024]{{0}} get-tuple-element(%loop), index=1
  %total = f32[1024]{{0}} all-reduce(%norm), replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %turned = f32[1024]{{0}} copy(%total), {estimated(500)}
  %looked.up = f32[1024]{{0}} fusion(%turned), kind=kCustom, calls=%product, {estimated(2**63 - 1)}
  %moved = (f32[1024]{{0}}, f32[1024]{{0}}) copy-start(%turned)
  %splash_mha_fwd.3 = f32[1024]{{0}} custom-call(%turned), custom_call_target="tpu_custom_call"
  ROOT %sum = f32[1024]{{0}} add(%total, %total), {estimated(100)}
}}
"""  # noqa: E501
# One collective takes 10,000 cycles.
WIRE = 10_000 / CLOCK


def forecast(text=TEXT, wire=WIRE):
    return forecast_of(text, CHIP, {"splash_mha_fwd": CHIP.bf16 / 1000}, lambda _: wire)


def test_the_clock_is_the_peak_by_the_products_of_a_cycle():
    """1.5 GHz for v5e, 1.75 for v5p and 1.05 for v4, as their papers and documentation give them."""
    assert clock_of(CHIPS["v5e"]) == pytest.approx(1.5e9, rel=0.01)
    assert clock_of(CHIPS["v5p"]) == pytest.approx(1.75e9, rel=0.01)
    assert clock_of(CHIPS["v4"]) == pytest.approx(1.05e9, rel=0.01)


def test_sums_of_a_text_made_by_hand():
    seconds = forecast().by_kind()
    # Three gathers end 4,000 cycles after the product of 6,000 beside them. Nothing hides the all-reduce.
    assert seconds[Kind.COLLECTIVES] == pytest.approx((3 * 4000 + 10_000) / CLOCK)
    assert seconds[Kind.COPIES] == pytest.approx(500 / CLOCK)
    assert seconds[Kind.ELEMENTWISE] == pytest.approx(100 / CLOCK)
    # A thousandth of a second at the peak.
    assert seconds[Kind.ATTENTION] == pytest.approx(1e-3)
    # The fusion with the sentinel counts by its bytes: it reads and writes 1,024 float32.
    (unknown,) = [kernel for kernel in forecast().kernels if kernel.estimate is Estimate.BYTES]
    assert unknown.seconds == pytest.approx(2 * 1024 * 4 / CHIP.hbm)
    assert seconds[Kind.PRODUCTS] == pytest.approx(3 * 6000 / CLOCK + unknown.seconds)
    assert forecast().seconds == pytest.approx(sum(seconds.values()))
    described = forecast().described()
    assert described["hidden_collectives"] == pytest.approx(3 * 6000 / CLOCK)
    assert described["async_copies_left_out"] == 1 + 3


def test_a_collective_that_is_short_is_hidden():
    assert forecast(wire=1000 / CLOCK).by_kind()[Kind.COLLECTIVES] == pytest.approx(1000 / CLOCK)


def test_the_links_carry_one_collective_after_the_other():
    """Two gathers start together and take 5,000 cycles each: after the product of 6,000 cycles the second one
    needs 4,000 more.
    """
    text = TEXT
    for name in ("start", "done"):
        begin = text.index(f"%{name} (")
        block = text[begin : text.index("\n}\n", begin) + 3]
        other = block.replace(f"%{name} (", f"%{name}2 (").replace('chain_id="7"', 'chain_id="8"')
        text = text.replace(block, f"{block}\n{other}")
    lines = {"%begun": "calls=%start", "%whole": "calls=%done"}
    for name, calls in lines.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name} = "))
        text = text.replace(line, f"{line}\n{line.replace(name, f'{name}2').replace(calls, f'{calls}2')}")
    exposed = forecast(text, wire=5000 / CLOCK).by_kind()[Kind.COLLECTIVES]
    # In each of three iterations, and the all-reduce after them.
    assert exposed == pytest.approx((3 * 4000 + 5000) / CLOCK)


# Libtpu's text of a scatter on the SparseCore: a call that runs beside the others, until `call-done`.
SCATTER = """%called (gradient: bf16[32,128], ready: token[]) -> bf16[8,128] {
  %ready = token[] parameter(1)
  %gradient = bf16[32,128]{1,0} parameter(0)
  ROOT %scatter = bf16[8,128]{1,0} reduce-scatter(%gradient), replica_groups={{0,1,2,3}}, to_apply=%add
}, execution_thread="sparsecore"

"""
STARTS = '((bf16[32,128]{1,0}, token[]), bf16[8,128]{1,0}) call-start(%mine), async_execution_thread="sparsecore", to_apply=%called'  # noqa: E501


def test_a_scatter_on_the_sparse_core_runs_beside_products():
    """Three scatters of 10,000 cycles, each beside a product of 6,000."""
    start = TEXT.index("%start (")
    text = TEXT[:start] + SCATTER + TEXT[start:]
    changes = {
        "  %begun = ": f"  %begun = {STARTS}",
        "  %whole = ": "  %whole = bf16[8,128]{1,0} call-done(%begun)",
    }
    for name, changed in changes.items():
        line = next(line for line in text.splitlines() if line.startswith(name))
        text = text.replace(line, changed)
    result = forecast(text)
    assert result.by_kind()[Kind.COLLECTIVES] == pytest.approx((3 * 4000 + 10_000) / CLOCK)
    assert result.described()["hidden_collectives"] == pytest.approx(3 * 6000 / CLOCK)
    assert result.by_kind()[Kind.ELEMENTWISE] == forecast().by_kind()[Kind.ELEMENTWISE]
    scatters = [moved for moved in Program(text).collectives() if moved.kind == "reduce-scatter"]
    assert [(moved.bytes, moved.times, moved.rings) for moved in scatters] == [(32 * 128 * 2, 3, None)]


@pytest.mark.parametrize(("directions", "rings"), [(2, 1), (4, 2), (1, 1)])
def test_the_rings_of_a_scatter_on_the_sparse_core(directions, rings):
    """As libtpu writes them: each ring twice, once for each direction."""
    listed = ",".join(
        ['{"phase_rings":[{"ring_type":"ICI_RING_TYPE_UNIDIR_CW","core_count":"16"}]}'] * directions
    )
    config = f'backend_config={{"ici_strategy_config":{{"color_strategies":[{listed}]}}}}'
    text = SCATTER.replace("%called", "ENTRY %called").replace("to_apply=%add", f"to_apply=%add, {config}")
    (scatter,) = Program(text).collectives()
    assert scatter.rings == rings


def test_kernels_have_their_line_in_this_package():
    grouped = forecast().grouped()
    (product,) = [kernel for kernel in grouped if kernel["name"] == "mlp/dot_general"]
    assert (product["source"], product["times"], product["cycles"]) == ("model/layers.py:62", 3, 18_000)
    table = kernels_table(grouped)
    assert "products: mlp/dot_general, model/layers.py:62, compiler" in table
    assert len(kernels_table(grouped, 2).splitlines()) == 3


def test_a_text_without_estimates_is_not_counted_as_zero():
    assert forecast_of(TEXT.replace("estimated_cycles", "cycles"), CHIP, {}, lambda _: WIRE) is None
    sentinels = TEXT
    for cycles in (6000, 500, 100):
        sentinels = sentinels.replace(f'"{cycles}"', f'"{2**63 - 1}"')
    assert forecast(sentinels) is None


@pytest.mark.slow
def test_more_layers_and_longer_windows_take_longer(tiny_toml, tmp_path, capsys):
    """As libtpu compiles them."""

    def planned(*overrides):
        options = [part for override in overrides for part in ("--set", override)]
        kernels = tmp_path / "kernels.txt"
        command = ["plan", str(tiny_toml), "--topology", "v5e:2x2", "--step-only", "--kernels", str(kernels)]
        assert main([*command, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out), kernels.read_text()

    few, text = planned()
    assert few["forecast_seconds"] > few["step_seconds_bound"] > 0
    assert 0 < few["forecast_mfu"] < few["mfu_bound"]
    assert "products: " in text
    assert "model/layers.py:" in text
    many, _ = planned("model.shape.num_hidden_layers=6")
    assert many["forecast_seconds"] > 1.5 * few["forecast_seconds"]
    long, _ = planned("data.seq_len=512", "model.shape.max_position_embeddings=512")
    assert long["forecast_seconds"] > few["forecast_seconds"]
