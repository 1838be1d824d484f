"""Topologies, FLOPs and what a program moves, on inputs whose answers are known otherwise."""

import jax
import jax.numpy as jnp
import pytest

from babel_jax.config import AttentionKernel, LayerType, ModelConfig, Remat
from babel_jax.errors import BadInput
from babel_jax.model.decoder import abstract_params, count_parameters, describe
from babel_jax.model.execution import Execution
from babel_jax.model.flops import model_flops_per_token
from babel_jax.model.parallel import WEIGHT_AXES, Parallelism, mesh_axes
from babel_jax.tpu.chips import chip_of
from babel_jax.tpu.flops import pallas_flops, program_flops
from babel_jax.tpu.hlo import Program
from babel_jax.tpu.hlo_instruction import array_bytes
from babel_jax.tpu.worker import out_of_hbm
from babel_jax.training.loss import summed_loss


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5x:8x8", "no chip is named 'v5x'; near: v5e, v5p"),
        ("7x:4x4x4", "no chip is named '7x'; near: tpu7x"),
        ("v5p:8x8", "v5p has 3 extents; near: v5p:4x4x4, v5p:2x4x4, v5p:4x4x8"),
        ("v5p:3x3x3", "no such slice of v5p; near: v5p:2x4x4"),
        ("v5p:6x6x6", "no such slice of v5p; near: v5p:4x4x12, v5p:4x8x8"),
        ("v5p:2x4x8", "no such slice of v5p; near: v5p:4x4x4"),
        ("v5e:2x16", "no such slice of v5e; near: v5e:4x8"),
        ("v5e:32x32", "no such slice of v5e; near: v5e:16x16"),
        ("v6e", "v6e has 2 extents"),
        ("v5e:16x", "v5e has 2 extents"),
    ],
)
def test_a_topology_that_does_not_exist_is_refused_with_the_near_ones(topology, message):
    with pytest.raises(BadInput, match=message):
        chip_of(topology)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("pred[3,5]{1,0}", 15),
        ("s4[7]{0}", 4),
        ("f8e4m3fn[8,128]{1,0:T(8,128)(4,1)}", 1024),
        ("f8e4m3b11fnuz[16]{0}", 16),
        ("f8e5m2[]", 1),
        ("bf16[2,3]{1,0}", 12),
        ("c64[2]{0}", 16),
        ("(f32[4]{0}, token[], u32[]{:S(2)})", 20),
        ("token[]", 0),
        ("opaque[]", 0),
    ],
)
def test_arrays_of_every_type_have_bytes(shape, size):
    """The names are XLA's (primitive types of its documentation). An 8-bit float had none before."""
    assert array_bytes(shape) == size


@pytest.mark.parametrize(
    "topology",
    ["v5e:4x8", "v6e:16x8", "v4:2x2x4", "v5p:2x2x1", "v5p:8x8x4", "v5p:12x12x12", "tpu7x:16x16x36"],
)
def test_slices_that_can_be_had(topology):
    assert chip_of(topology).name == topology.partition(":")[0]


def test_only_hbm_counts_as_memory_that_more_chips_would_give():
    """As libtpu 0.0.42 says it, shortened."""
    hbm = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, HLO temporaries (91.47G) exceed available HBM "
        "(15.75G)."
    )
    found = out_of_hbm(hbm)
    assert (found["needs"], found["has"]) == (91.47, 15.75)
    vmem = (
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while "
        "allocating on stack"
    )
    assert out_of_hbm(vmem) is None
    assert out_of_hbm("INTERNAL: a bug") is None


def test_the_rates_are_those_published():
    assert (chip_of("v5p:8x8x8").bf16, chip_of("v5e:16x16").hbm, chip_of("v6e:8x8").ici) == (
        459e12,
        819e9,
        400e9,
    )


# What XLA for TPU writes, in the forms that matter: a loop of 5 with a gather in two parts, a scatter that is
# called an all-reduce, an all-reduce that is one, one between slices, and a permutation.
HLO = """\
HloModule step

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%start (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[32,128]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %custom-call.1 = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (q: bf16[8,128]) -> bf16[32,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %all-gather.2 = bf16[32,128]{1,0} all-gather(%q), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %custom-call.2 = bf16[32,128]{1,0} custom-call(%all-gather.2), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.7 (input: bf16[32,128]) -> bf16[8,128] {
  %input = bf16[32,128]{1,0} parameter(0)
  %all-reduce.3 = bf16[32,128]{1,0} all-reduce(%input), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %cut = bf16[8,128]{1,0} dynamic-slice(%all-reduce.3, %input), dynamic_slice_sizes={8,128}
}

%body (state: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %state = (s32[], bf16[8,128]{1,0}) parameter(0)
  %mine = bf16[8,128]{1,0} get-tuple-element(%state), index=1
  %begun = (bf16[8,128]{1,0}, bf16[32,128]{1,0}) fusion(%mine), kind=kCustom, calls=%start
  %whole = bf16[32,128]{1,0} fusion(%mine), kind=kCustom, calls=%done
  %kept = bf16[8,128]{1,0} fusion(%whole), kind=kCustom, calls=%all-reduce-scatter.7
  ROOT %next = (s32[], bf16[8,128]{1,0}) tuple(%mine, %kept)
}

%condition (state.1: (s32[], bf16[8,128])) -> pred[] {
  %state.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%state.1, %limit), direction=LT
}

ENTRY %main (x: bf16[8,128]) -> f32[16] {
  %x = bf16[8,128]{1,0} parameter(0)
  %loop = (s32[], bf16[8,128]{1,0}) while(%x), condition=%condition, body=%body
  %norm = f32[16]{0} constant({...})
  %moved = f32[16]{0} collective-permute(%norm), channel_id=5, source_target_pairs={{0,0},{1,3}}
  %sent = (f32[8,16]{1,0}, u32[], token[]) send(%x, %x), channel_id=2, is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %column = f32[16]{0} all-reduce(%moved), channel_id=6, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
  %row = f32[16]{0} all-reduce(%moved), channel_id=7, replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, to_apply=%add
  ROOT %total = f32[16]{0} all-reduce(%moved), channel_id=4, replica_groups={{0,2},{1,3}}, to_apply=%add
}
"""


def test_collectives_count_by_their_kind_and_how_often_they_run():
    found = {(one.kind, one.bytes, one.times, one.group) for one in Program(HLO).collectives()}
    assert found == {
        ("all-gather", 32 * 128 * 2, 5, (0, 1, 2, 3)),
        ("reduce-scatter", 32 * 128 * 2, 5, (0, 1, 2, 3)),
        ("collective-permute", 16 * 4, 1, (1, 3)),
        ("all-reduce", 2 * 16 * 4, 1, (0, 2)),
        ("all-reduce", 2 * 16 * 4, 1, (0, 4)),
        ("all-reduce", 2 * 16 * 4, 1, (0, 2, 4, 6)),
        ("all-reduce", 2 * 8 * 16 * 4, 1, ()),
    }


# As XLA writes it for CUDA: two arrays are gathered together, in a loop that says its trips; the constant of its
# condition is larger, because the first iteration was taken out.
CUDA_HLO = """HloModule jit_step
%body (state: (s32[], bf16[2,8], bf16[4,8])) -> (s32[], bf16[2,8], bf16[4,8]) {
  %state = (s32[], bf16[2,8]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %a = bf16[2,8]{1,0} get-tuple-element(%state), index=1
  %b = bf16[4,8]{1,0} get-tuple-element(%state), index=2
  %begun = ((bf16[2,8]{1,0}, bf16[4,8]{1,0}), (bf16[8,8]{1,0}, bf16[16,8]{1,0})) all-gather-start(%a, %b), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = (bf16[8,8]{1,0}, bf16[16,8]{1,0}) all-gather-done(%begun)
  ROOT %next = (s32[], bf16[2,8]{1,0}, bf16[4,8]{1,0}) tuple(%state, %a, %b)
}

%condition (state.1: (s32[], bf16[2,8], bf16[4,8])) -> pred[] {
  %state.1 = (s32[], bf16[2,8]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %limit = s32[] constant(29)
  ROOT %less = pred[] compare(%state.1, %limit), direction=LT
}

ENTRY %main (x: bf16[2,8]) -> bf16[2,8] {
  %x = bf16[2,8]{1,0} parameter(0)
  ROOT %loop = (s32[], bf16[2,8]{1,0}, bf16[4,8]{1,0}) while(%x), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"28"}}
}
"""


def test_arrays_gathered_together_all_count_and_a_loop_runs_as_often_as_it_says():
    (found,) = Program(CUDA_HLO).collectives()
    assert (found.kind, found.bytes, found.times) == ("all-gather", (8 + 16) * 8 * 2, 28)


def test_what_a_program_of_xla_moves_is_what_it_must(tmp_path):
    """A loop that adds a row of a matrix to a vector, on CPU: the rows alone are read, not the matrix each
    time.
    """

    def run(matrix):
        return jax.lax.scan(lambda total, row: (jnp.sin(total) + row, None), jnp.zeros(4096), matrix)[0]

    text = jax.jit(run).lower(jax.ShapeDtypeStruct((50, 4096), jnp.float32)).compile().as_text()
    vector = 4096 * 4
    assert 50 * 3 * vector <= Program(text).hbm_bytes() <= 50 * 8 * vector


NESTED = """\
%slice (rows: f32[50,4096], place: s32[]) -> f32[4096] {
  %rows = f32[50,4096]{1,0} parameter(0)
  %place = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,4096]{1,0} dynamic-slice(%rows, %place, %zero), dynamic_slice_sizes={1,4096}
  ROOT %flat = f32[4096]{0} bitcast(%row)
}

%add.1 (all: f32[50,4096], number: s32[], kept: f32[50,4096]) -> f32[50,4096] {
  %all = f32[50,4096]{1,0} parameter(0)
  %number = s32[] parameter(1)
  %kept = f32[50,4096]{1,0} parameter(2)
  %one = f32[4096]{0} fusion(%all, %number), kind=kLoop, calls=%slice
  %new = f32[1,4096]{1,0} bitcast(%one)
  ROOT %changed = f32[50,4096]{1,0} dynamic-update-slice(%kept, %new, %number, %number)
}

ENTRY %main (a: f32[50,4096], b: s32[], c: f32[50,4096]) -> f32[50,4096] {
  %a = f32[50,4096]{1,0} parameter(0)
  %b = s32[] parameter(1)
  %c = f32[50,4096]{1,0} parameter(2)
  ROOT %out = f32[50,4096]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%add.1
}
"""


def test_what_a_fusion_within_a_fusion_slices_is_not_read_in_full():
    row, number = 4096 * 4, 4
    assert Program(NESTED).hbm_bytes() == 2 * row + number


PREFETCHED = """\
%cut (rows: f32[50,4096], places: s32[2]) -> f32[2,4096] {
  %rows = f32[50,4096]{1,0} parameter(0)
  %places = s32[2]{0} parameter(1)
  %picked = f32[2,4096]{1,0} gather(%rows, %places), offset_dims={1}, slice_sizes={1,4096}
  %first = f32[2,4096]{1,0} slice(%rows), slice={[0:2], [0:4096]}
  ROOT %sum = f32[2,4096]{1,0} add(%picked, %first)
}

ENTRY %main (a: f32[50,4096], b: s32[2]) -> f32[2,4096] {
  %a = f32[50,4096]{1,0} parameter(0)
  %b = s32[2]{0:S(1)} parameter(1)
  %half = ((f32[50,4096]{1,0}), f32[25,4096]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:25], [0:4096]}
  %half.1 = f32[25,4096]{1,0:S(1)} slice-done(%half)
  %begun = (f32[50,4096]{1,0:S(1)}, f32[50,4096]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %whole = f32[50,4096]{1,0:S(1)} copy-done(%begun)
  ROOT %out = f32[2,4096]{1,0:S(1)} fusion(%a, %b), kind=kLoop, calls=%cut
}
"""


def test_what_is_brought_onto_the_chip_ahead_is_read_once_and_in_part():
    """Half of the rows, all of them, and two picked and two sliced; nothing is written to HBM."""
    assert Program(PREFETCHED).hbm_bytes() == (25 + 50 + 2 + 2) * 4096 * 4


# A gather that runs beside a product: three fusions take its buffers and return them.
BESIDE = """\
%start (p: bf16[8,128]) -> (bf16[8,128], bf16[32,128], u32[]) {
  %p = bf16[8,128]{1,0} parameter(0)
  %all-gather.1 = bf16[32,128]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="7"}
  ROOT %begin = (bf16[8,128]{1,0}, bf16[32,128]{1,0}, u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (p.1: bf16[8,128], whole.1: bf16[32,128], rows.1: bf16[64,64]) -> (bf16[64,64], bf16[8,128], bf16[32,128]) {
  %p.1 = bf16[8,128]{1,0} parameter(0)
  %whole.1 = bf16[32,128]{1,0} parameter(1)
  %rows.1 = bf16[64,64]{1,0} parameter(2)
  %product = bf16[64,64]{1,0} convolution(%rows.1, %rows.1), dim_labels=bf_io->bf
  ROOT %both = (bf16[64,64]{1,0}, bf16[8,128]{1,0}, bf16[32,128]{1,0}) tuple(%product, %p.1, %whole.1)
}

%done (q: bf16[8,128], whole.2: bf16[32,128]) -> bf16[32,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %whole.2 = bf16[32,128]{1,0} parameter(1)
  ROOT %end = bf16[32,128]{1,0} custom-call(%q, %whole.2), custom_call_target="AsyncCollectiveDone", frontend_attributes={chain_id="7"}
}

ENTRY %main (x: bf16[8,128], rows: bf16[64,64]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %rows = bf16[64,64]{1,0} parameter(1)
  %begun = (bf16[8,128]{1,0}, bf16[32,128]{1,0}, u32[]{:S(2)}) fusion(%x), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %mine = bf16[8,128]{1,0} get-tuple-element(%begun), index=0
  %buffer = bf16[32,128]{1,0} get-tuple-element(%begun), index=1
  %beside = (bf16[64,64]{1,0}, bf16[8,128]{1,0}, bf16[32,128]{1,0}) fusion(%mine, %buffer, %rows), kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}, calls=%async_collective_fusion.3
  %sent = bf16[8,128]{1,0} get-tuple-element(%beside), index=1
  %filled = bf16[32,128]{1,0} get-tuple-element(%beside), index=2
  ROOT %whole = bf16[32,128]{1,0} fusion(%sent, %filled), kind=kCustom, output_to_operand_aliasing={{}: (1, {})}, calls=%done
}
"""


def test_buffers_of_a_gather_are_not_moved_by_the_product_beside_it():
    """The start counts the shard twice and the whole once, the product what it reads and writes itself, and
    the end the shard.
    """
    shard, whole, rows = 8 * 128 * 2, 32 * 128 * 2, 64 * 64 * 2
    assert Program(BESIDE).hbm_bytes() == 2 * shard + whole + 2 * rows + shard


def test_heads_of_64_take_as_many_flops_in_splash_attention_as_heads_of_128():
    """Half of the lanes of a matrix unit idle."""

    def flops_of(head_dim):
        config = ModelConfig(
            vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=head_dim,
        )  # fmt: skip
        tokens = {name: jax.ShapeDtypeStruct((1, 256), jnp.int32) for name in ("tokens", "segment_ids")}
        execution = Execution(kernel=AttentionKernel.SPLASH)
        jaxpr = jax.make_jaxpr(
            lambda params, batch: summed_loss(config, params, batch, execution=execution)[0]
        )(abstract_params(config), tokens)
        return pallas_flops(jaxpr.jaxpr, config, 256)

    small, large = flops_of(64), flops_of(128)
    assert small == large
    (flops,) = small.values()
    # Two products of all scores of 256 x 256, in one block, for 2 heads of 128.
    assert flops == 2 * 2 * 2 * 128 * 256 * 256


def test_flops_of_a_step_are_those_of_its_products():
    """Counted by hand for the forward pass; backward is twice that, and the causal half is not skipped by
    XLA's attention.
    """
    config = ModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    batch, time = 2, 16
    tokens = {name: jax.ShapeDtypeStruct((batch, time), jnp.int32) for name in ("tokens", "segment_ids")}
    jaxpr = jax.make_jaxpr(lambda params, batch: summed_loss(config, params, batch)[0])(
        abstract_params(config), tokens
    )
    matrices = 3 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 80) + 96 * 32
    scores = 3 * 2 * time * 32
    assert program_flops(jaxpr.jaxpr, config, time) == 2 * batch * time * (matrices + scores)
    norms_and_biases = count_parameters(config) - matrices - 96 * 32
    assert model_flops_per_token(config, time) == 3 * (2 * (matrices + norms_and_biases) + scores)


@pytest.mark.parametrize("kernel", [AttentionKernel.XLA, AttentionKernel.SPLASH])
def test_what_remat_keeps_is_not_counted_twice(kernel):
    """`mlp` keeps all products with weights, and what attention gives; `full` does all of a layer again but
    its last product.
    """
    config = ModelConfig(
        vocab_size=96,
        hidden_size=256,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    tokens = {name: jax.ShapeDtypeStruct((2, 128), jnp.int32) for name in ("tokens", "segment_ids")}

    def flops(remat, gradient=True):
        def loss(params, batch):
            return summed_loss(config, params, batch, execution=Execution(remat=remat, kernel=kernel))[0]

        return program_flops(
            jax.make_jaxpr(jax.grad(loss) if gradient else loss)(abstract_params(config), tokens).jaxpr,
            config,
            128,
        )

    assert flops(Remat.MLP) == flops(Remat.NONE)
    head, down = 2 * 2 * 128 * 96 * 256, 3 * 2 * 2 * 128 * 80 * 256
    assert flops(Remat.FULL) - flops(Remat.NONE) == flops(Remat.NONE, gradient=False) - head - down


def test_model_flops_of_a_window_count_what_it_sees():
    config = ModelConfig(
        vocab_size=96, hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        sliding_window=8,
        layer_types=(LayerType.FULL, LayerType.SLIDING),
    )  # fmt: skip
    whole = config.model_copy(update={"layer_types": ()})
    saved = model_flops_per_token(whole, 1024) - model_flops_per_token(config, 1024)
    seen = sum(min(place + 1, 8) for place in range(1024)) / 1024
    assert saved == pytest.approx(12 * 32 * (512 - seen), rel=0.01)


def program_of_half(config, tokens, gradient=False, **options):
    """The jaxpr of the loss of one window on one of two devices of the context axis."""
    parallel = Parallelism((("context", 2),), gather_stages=(("context",),), scatter_stages=(("context",),))

    def half(parameter):
        axes = mesh_axes(parameter.logical_axes)
        shape = (
            size // 2 if own == WEIGHT_AXES else size for size, own in zip(parameter.shape, axes, strict=True)
        )
        return jax.ShapeDtypeStruct(tuple(shape), jnp.float32)

    def loss(params, batch):
        return summed_loss(config, params, batch, execution=Execution(parallel=parallel, **options))[0]

    batch = {name: jax.ShapeDtypeStruct((1, tokens), jnp.int32) for name in ("tokens", "segment_ids")}
    function = jax.grad(loss) if gradient else loss
    return jax.make_jaxpr(function, axis_env=[("context", 2)])(
        jax.tree.map(half, describe(config)), batch
    ).jaxpr


@pytest.mark.parametrize("window", [None, 1024])
def test_flops_of_parts_are_those_of_the_blocks_that_they_see(window):
    """Four parts of 1,024 tokens, a block each, on two devices: the first and the last on one see one and
    four blocks, the others two and three; with a window of 1,024 tokens all but the first see two. XLA's
    attention does all four for each."""
    config = ModelConfig(
        vocab_size=96, hidden_size=256, intermediate_size=80, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window, layer_types=(LayerType.FULL if window is None else LayerType.SLIDING,),
    )  # fmt: skip
    xla, splash = (
        program_flops(program_of_half(config, 4096, kernel=kernel), config, 4096)
        for kernel in (AttentionKernel.XLA, AttentionKernel.SPLASH)
    )
    blocks = (1 + 2 + 3 + 4) / 2 if window is None else (1 + 2 + 2 + 2) / 2
    assert xla - splash == (2 * 4 - blocks) * 2 * 2 * 1024 * 1024 * 256


def test_keys_and_values_are_gathered_once_where_memory_is_not_short():
    config = ModelConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    mlp, gate = (
        str(program_of_half(config, 64, gradient=True, remat=remat)).count("all_gather[")
        for remat in (Remat.MLP, Remat.GATE)
    )
    assert gate - mlp == 2
