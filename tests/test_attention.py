"""Attention of transformers, and what is made of it, against a network written out in
loops, finite differences and timm.
"""

from dataclasses import replace

import numpy as np
import oracles_attention as oracle
import pytest
import timm
import torch
import torchvision
from oracles_attention import TinyViT, Twin
from test_conformance import state_of
from torch import nn
from torch.nn import functional

from consilience import api, registry
from consilience.models.attention import (
    AttentionPlan,
    Attentions,
    blocks_of,
    form_of_tokens,
    plan_of,
    read_attention,
)
from consilience.models.network import wrap
from consilience.types import ClassTarget, ConsilienceError, NotApplicable, Sample

METHODS = ("attention", "rollout", "gradient-rollout", "generic-attention", "legrad")
EVERY = (*METHODS, "attnlrp", "transformer-attribution")
KINDS = (("token", 1), ("token", 3), ("both", 2), ("avg", 0), ("avg", 1), ("map", 0))
TARGET = 2


def tiny(**options):
    net = TinyViT(**options)
    return wrap(
        net, size=(8, 12), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), name="tiny-vit"
    ).using(engine="torch")


def image(seed=0, size=(8, 12)):
    return Sample(
        f"noise{seed}",
        np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8),
    )


def as_seen(model, sample):
    """The normalised image (3, h, w) in float64."""
    return model.recipe.normalised(model.view(sample).pixels.double())[0].numpy()


def grid_of(explanation):
    return explanation.extras["grid"]


def expected_grid(row, net):
    return np.asarray(row)[net.prefix :].reshape(2, 3)


def rows_read(matrix, net):
    rows = {
        "token": [0],
        "both": [0, 1],
        "avg": range(net.prefix, len(matrix)),
        "map": [0],
    }[net.pool]
    return np.mean([matrix[row] for row in rows], axis=0)


def attention_gradients(twin, seen, index):
    """d logit / d attention of every layer and of the pool, by finite differences."""
    kept = twin.run(seen)[1]
    keys = [*range(twin.depth), "pool"][: len(kept)]

    def score(key):
        return lambda attention: twin.run(
            seen, {key: attention[0] if key == "pool" else attention}
        )[0][index]

    return kept, [
        oracle.differences(score(key), one)
        for key, one in zip(keys, kept, strict=True)
    ]


# ---- reading


@pytest.mark.parametrize("how", ["fused", "plain", "functional", "module"])
@pytest.mark.parametrize(("pool", "prefix"), KINDS)
def test_probabilities_are_those_of_the_definition(how, pool, prefix):
    model = tiny(how=how, pool=pool, prefix=prefix)
    twin, sample = Twin(model.module), image()
    view = model.view(sample)
    reading = read_attention(model, view.pixels, plan_of(model, view.pixels))
    logits, kept, _ = twin.run(as_seen(model, sample))
    np.testing.assert_allclose(reading.outputs[0].detach(), logits, atol=1e-4)
    torch.testing.assert_close(
        reading.outputs, model.logits(view.pixels), rtol=0, atol=1e-5
    )
    assert len(reading.nodes) == len(kept)
    for at, expected in enumerate(kept):
        np.testing.assert_allclose(reading.values(at)[0], expected, atol=1e-5)


@pytest.mark.parametrize("how", ["fused", "plain", "module"])
def test_gradients_are_finite_differences(how):
    model = tiny(how=how)
    seen = model.view(image()).pixels
    plan = plan_of(model, seen)
    reading = read_attention(model, seen, plan, graph=True)
    _, expected = attention_gradients(
        Twin(model.module), as_seen(model, image()), TARGET
    )
    for found, wanted in zip(
        reading.gradients(reading.outputs[0, TARGET], [0, 1]), expected, strict=True
    ):
        np.testing.assert_allclose(found[0], wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("pool", "prefix"), KINDS)
def test_tokens_that_are_read_are_found(pool, prefix):
    model = tiny(pool=pool, prefix=prefix)
    plan = plan_of(model, model.view(image()).pixels)
    assert (
        plan.rows
        == {
            "token": (0,),
            "both": (0, 1),
            "avg": tuple(range(prefix, prefix + 6)),
            "map": (0,),
        }[pool]
    )
    form = form_of_tokens(model, prefix + 6)
    assert (form.grid, form.prefix) == ((2, 3), prefix)


def test_places_are_named_in_forward_order():
    model = tiny(how="module", depth=3, pool="map", prefix=0)
    plan = plan_of(model, model.view(image()).pixels)
    assert [place.module for place in plan.places] == [
        f"blocks.{at}.attn.inner" for at in range(3)
    ] + ["attn_pool"]
    assert [place.block for place in plan.places] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "attn_pool",
    ]
    assert [(place.heads, place.queries, place.keys) for place in plan.places] == [
        (2, 6, 6)
    ] * 3 + [(1, 1, 6)]


def test_blocks_hold_one_attention_each():
    assert blocks_of(["a.0.x.attn", "a.1.attn", "pool"]) == ["a.0", "a.1", "pool"]
    assert blocks_of(["one.layer.attn"]) == ["one"]
    assert blocks_of(["blocks.0", "blocks.0"]) == ["blocks.0", "blocks.0"]


def masked(function, **options):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 5, 4) for heads in options.pop("heads", (4, 4, 4))
    )
    return function(query, key, value, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attn_mask": torch.randn(5, 5)},
        {"attn_mask": torch.ones(5, 5).tril().bool()},
        {"is_causal": True},
        {"scale": 0.3},
        {"heads": (4, 2, 2), "enable_gqa": True},
    ],
)
def test_explicit_attention_is_torchs(options):
    found = []
    with Attentions(found.append):
        ours = masked(functional.scaled_dot_product_attention, **options)
    torch.testing.assert_close(
        ours,
        masked(functional.scaled_dot_product_attention, **options),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(found[0].sum(dim=-1), torch.ones(2, 4, 5))


@pytest.mark.parametrize("average", [True, False])
def test_multi_head_attention_gives_its_weights_where_asked(average):
    torch.manual_seed(0)
    module, x, found = (
        nn.MultiheadAttention(8, 2, batch_first=True).eval(),
        torch.randn(3, 5, 8),
        [],
    )
    with Attentions(found.append):
        ours = module(x, x, x, average_attn_weights=average)
    for one, other in zip(
        ours, module(x, x, x, average_attn_weights=average), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert found[0].shape == (3, 2, 5, 5)
    assert len(found) == 1


def test_a_softmax_over_classes_or_channels_is_no_attention():
    found = []
    with Attentions(found.append):
        torch.randn(2, 5).softmax(dim=-1)
        torch.randn(2, 3, 4, 4).softmax(dim=1)
        functional.softmax(torch.randn(2, 5, 5), 2)
    assert [tuple(one.shape) for one in found] == [(2, 5, 5)]


# ---- the methods


@pytest.mark.parametrize(("pool", "prefix"), KINDS)
@pytest.mark.parametrize(
    ("layer", "heads"),
    [("last", "mean"), ("0", "max"), ("blocks.1", "min"), ("-2", 1)],
)
def test_raw_attention(pool, prefix, layer, heads):
    model = tiny(pool=pool, prefix=prefix)
    kept = Twin(model.module).run(as_seen(model, image()))[1]
    at = {"last": len(kept) - 1, "0": 0, "blocks.1": 1, "-2": len(kept) - 2}[layer]
    if isinstance(heads, int) and len(kept[at]) == 1:
        heads = 0
    matrix = oracle.fuse(kept[at], heads)
    row = (
        matrix.mean(axis=0)
        if pool == "map" and at < 2
        else rows_read(matrix, model.module)
    )
    found = api.explain(
        model, image(), f"attention:layer={layer},heads={heads}", target=TARGET
    )
    np.testing.assert_allclose(
        grid_of(found), expected_grid(row, model.module), rtol=1e-4
    )
    assert found.provenance["layer"] == ["blocks.0", "blocks.1", "attn_pool"][at]


@pytest.mark.parametrize(("pool", "prefix"), KINDS)
@pytest.mark.parametrize(
    ("spec", "heads", "options"),
    [
        ("residual=0.5", "mean", {}),
        ("heads=max,discard=0.6", "max", {"share": 0.6}),
        ("heads=min,residual=0.2", "min", {"residual": 0.2}),
    ],
)
def test_rollout(pool, prefix, spec, heads, options):
    model = tiny(pool=pool, prefix=prefix, depth=3)
    kept = Twin(model.module).run(as_seen(model, image()))[1]
    expected = oracle.rolled([oracle.fuse(one, heads) for one in kept], **options)
    found = api.explain(model, image(), f"rollout:{spec}", target=TARGET)
    np.testing.assert_allclose(
        grid_of(found),
        expected_grid(rows_read(expected, model.module), model.module),
        rtol=1e-4,
    )


def test_rollout_up_to_a_layer():
    model = tiny(depth=3)
    kept = Twin(model.module).run(as_seen(model, image()))[1]
    expected = oracle.rolled([oracle.fuse(one, "mean") for one in kept[:2]])
    found = api.explain(model, image(), "rollout:layer=1", target=TARGET)
    np.testing.assert_allclose(
        grid_of(found), expected_grid(expected[0], model.module), rtol=1e-4
    )


@pytest.mark.parametrize(("pool", "prefix"), KINDS)
def test_gradient_rollout_and_generic_attention(pool, prefix):
    model = tiny(pool=pool, prefix=prefix)
    kept, gradients = attention_gradients(
        Twin(model.module), as_seen(model, image()), TARGET
    )
    pairs = list(zip(kept, gradients, strict=True))
    rolled = oracle.rolled(
        [oracle.mean_then_positive(*pair) for pair in pairs], share=0.3
    )
    for spec, matrix in (
        ("gradient-rollout:discard=0.3", rolled),
        ("generic-attention", oracle.generic(kept, gradients)),
        ("generic-attention:start=-1", oracle.generic(kept[1:], gradients[1:])),
    ):
        expected = expected_grid(rows_read(matrix, model.module), model.module)
        found = grid_of(api.explain(model, image(), spec, target=TARGET))
        np.testing.assert_allclose(
            found, expected, atol=2e-4 * np.abs(expected).max(), err_msg=spec
        )


@pytest.mark.parametrize(("pool", "prefix"), KINDS)
@pytest.mark.parametrize("start", [0, 1])
def test_legrad(pool, prefix, start):
    model = tiny(pool=pool, prefix=prefix)
    twin, seen = Twin(model.module), as_seen(model, image())
    _, kept, after = twin.run(seen)

    def score(at):
        if pool == "map":
            return lambda attention: twin.rest(after[at], {"pool": attention[0]}, [])[
                TARGET
            ]
        return lambda attention: twin.score_of_block(
            seen, at, {at: attention}, TARGET
        )

    def pooled(at):
        found = []
        twin.rest(after[at], {}, found)
        return found[0]

    layers = range(start, 2)
    given = [pooled(at) if pool == "map" else kept[at] for at in layers]
    expected = oracle.legrad(
        [
            oracle.differences(score(at), one)
            for at, one in zip(layers, given, strict=True)
        ]
    )
    found = grid_of(
        api.explain(model, image(), f"legrad:start={start}", target=TARGET)
    )
    wanted = expected_grid(expected, model.module)
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_of_one_layer_the_methods_are_each_other():
    """Limits: rollout of one layer is its attention but for scale; of the last block
    LeGrad's score is the network's.
    """
    model = tiny(depth=1)
    raw, rolled = (
        grid_of(api.explain(model, image(), name, target=TARGET))
        for name in ("attention", "rollout")
    )
    np.testing.assert_allclose(rolled, raw / 2, rtol=1e-5)
    reading = read_attention(
        model,
        model.view(image()).pixels,
        plan_of(model, model.view(image()).pixels),
        graph=True,
    )
    (gradient,) = reading.gradients(reading.outputs[0, TARGET], [0])
    expected = expected_grid(gradient.relu().mean(dim=(0, 1, 2)), model.module)
    np.testing.assert_allclose(
        grid_of(api.explain(model, image(), "legrad", target=TARGET)),
        expected,
        rtol=1e-4,
    )


def test_probability_is_another_score():
    model = tiny()
    maps = [
        grid_of(api.explain(model, image(), f"legrad:score={how}", target=TARGET))
        for how in ("logit", "probability")
    ]
    assert not np.allclose(maps[0], maps[1])


@pytest.mark.parametrize("name", ["attention", "rollout"])
def test_without_gradients_every_target_has_the_same_map(name):
    model = tiny()
    one, other = (
        api.explain(model, image(), name, target=target).values for target in (0, 3)
    )
    np.testing.assert_array_equal(one, other)


# ---- invariances


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("pool", ["token", "map"])
def test_many_images_are_many_of_one(name, pool, monkeypatch):
    """Each with its own target, in chunks of whatever size."""
    if (name, pool) == ("transformer-attribution", "map"):
        pytest.skip("transformer attribution is not defined for attention that pools")
    model = tiny(pool=pool, prefix=int(pool == "token"))
    explainer = api.resolve_explainer(model, name)
    samples = [image(seed) for seed in range(5)]
    views = [model.view(sample) for sample in samples]
    targets = [
        api.target_of_image(model, sample, index % 4, torch.zeros(1, 4))
        for index, sample in enumerate(samples)
    ]
    alone = [
        explainer.explain(model, view, target)
        for view, target in zip(views, targets, strict=True)
    ]
    for size in (5, 2):
        monkeypatch.setattr(AttentionPlan, "images", lambda *_, size=size: size)
        together = explainer.explain_batch(model, views, targets)
        for heat, own in zip(together, alone, strict=True):
            torch.testing.assert_close(heat.values, own.values, rtol=1e-4, atol=1e-6)


def test_memory_bounds_the_images_of_a_pass():
    plan = AttentionPlan(plan_of(tiny(), tiny().view(image()).pixels).places, (0,))
    assert plan.size == 2 * 2 * 7 * 7
    assert plan.images(32, 1 << 30) == 32
    assert plan.images(32, 3 * 4 * 6 * plan.size) == 3
    assert plan.images(32, 1) == 1


class Breaks(TinyViT):
    """Fails in its head from some pass on."""

    passes = 0

    def forward(self, x):
        self.passes += 1
        if self.passes > 4:
            raise RuntimeError("broken on purpose")
        return super().forward(x)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("frozen", [True, False])
def test_module_comes_back_as_it_was(name, frozen):
    model = tiny(how="module")
    model.module.train()
    model.module.norm.eval()
    for parameter in model.module.parameters():
        parameter.requires_grad_(not frozen or parameter.ndim == 1)
    before = state_of(model.module)
    api.explain(model, image(), name, target=TARGET)
    assert state_of(model.module) == before


@pytest.mark.parametrize("name", EVERY)
def test_module_and_functions_come_back_after_an_exception(name):
    model = wrap(Breaks(), size=(8, 12)).using(engine="torch")
    view = model.view(image())
    plan_of(model, view.pixels)
    model.module.passes = 99
    before = state_of(model.module)
    with pytest.raises(RuntimeError, match="on purpose"):
        api.resolve_explainer(model, name).explain(
            model, view, api.target_of_image(model, image(), 0, torch.zeros(1, 4))
        )
    assert state_of(model.module) == before
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


def test_no_gradient_mode_outside_is_no_matter():
    model = tiny()
    plain = api.explain(model, image(), "generic-attention", target=TARGET).values
    with torch.no_grad():
        np.testing.assert_array_equal(
            api.explain(model, image(), "generic-attention", target=TARGET).values,
            plain,
        )


def test_frozen_weights_give_the_same_gradients():
    model = tiny()
    plain = api.explain(model, image(), "generic-attention", target=TARGET).values
    model.module.requires_grad_(False)
    np.testing.assert_allclose(
        api.explain(model, image(), "generic-attention", target=TARGET).values,
        plain,
        rtol=1e-5,
    )


# ---- refusals


def test_networks_without_attention_say_so(red_model, planted):
    for name in EVERY:
        with pytest.raises(NotApplicable, match="no attention"):
            api.explain(red_model, planted, name, target="red")


class Outside(TinyViT):
    """The residual is added outside of the modules that attend, so none of these
    returns what flows on.
    """

    def __init__(self):
        super().__init__(prefix=0)
        self.blocks = nn.Sequential(*[block.attn for block in self.blocks])

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x).mean(dim=1))


def test_legrad_refuses_blocks_that_do_not_return_their_tokens():
    model = wrap(Outside(), size=(8, 12)).using(engine="torch")
    with pytest.raises(NotApplicable, match="hand their tokens"):
        api.explain(model, image(), "legrad", target=TARGET)
    assert (
        np.ptp(api.explain(model, image(), "generic-attention", target=TARGET).values)
        > 0
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("attention:layer=blocks.7", "no attention of tiny-vit.* 'blocks.7'"),
        ("attention:layer=2", "'2'"),
        ("attention:heads=2", "there are 2 heads"),
        ("attention:heads=mode", "heads"),
        ("rollout:discard=1", "discard must be"),
        ("rollout:residual=-0.5", "residual must be"),
        ("legrad:start=2", "there are 2 layers"),
        ("generic-attention:start=-3", "there are 2 layers"),
    ],
)
def test_wrong_options(spec, message):
    with pytest.raises(ConsilienceError, match=message):
        api.explain(tiny(), image(), spec, target=TARGET)


# ---- families


def small(net, size):
    """With weights so large that attention is far from uniform, and its dry pass behind
    it.
    """
    for parameter in net.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.3)
    model = wrap(net.eval(), size=size).using(engine="torch")
    model.layers()
    return model


def timm_vit(**options):
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=5,
        **options,
    )


TIMM = {
    "class token": ({}, 1, (0,)),
    "registers": ({"reg_tokens": 4}, 5, (0,)),
    "gap": (
        {"class_token": False, "global_pool": "avg", "fc_norm": True},
        0,
        tuple(range(16)),
    ),
    "gap with a class token": ({"global_pool": "avg"}, 1, tuple(range(1, 17))),
    "norms of queries and keys": ({"qk_norm": True, "init_values": 0.1}, 1, (0,)),
    "attention pooling": ({"class_token": False, "global_pool": "map"}, 0, (0,)),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", TIMM)
def test_timm_attention_is_that_of_its_own_queries_and_keys(kind, fused):
    options, prefix, rows = TIMM[kind]
    model = small(timm_vit(**options), 32)
    for part in model.module.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = fused
    view, said = model.view(image(size=(32, 32))), []
    hooks = [
        b.attn.qkv.register_forward_hook(
            lambda _m, _i, out: said.append(out.detach())
        )
        for b in model.module.blocks
    ]
    logits = model.logits(view.pixels).detach()
    for hook in hooks:
        hook.remove()
    plan = plan_of(model, view.pixels)
    reading = read_attention(model, view.pixels, plan)
    torch.testing.assert_close(reading.outputs, logits, rtol=0, atol=1e-4)
    assert (plan.rows, form_of_tokens(model, 16 + prefix).prefix) == (rows, prefix)
    assert [place.block for place in plan.places[:3]] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    for at, (qkv, block) in enumerate(zip(said, model.module.blocks, strict=True)):
        q, k, _ = qkv[0].reshape(16 + prefix, 3, 3, 8).permute(1, 2, 0, 3)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        expected = [
            oracle.attend(*pair) for pair in zip(q.tolist(), k.tolist(), strict=True)
        ]
        np.testing.assert_allclose(reading.values(at)[0], expected, atol=1e-5)


@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_timm_vits(kind, name):
    model = small(timm_vit(**TIMM[kind][0]), 32)
    found = api.explain(model, image(size=(32, 32)), name, target=1)
    assert grid_of(found).shape == (4, 4)
    assert found.provenance["dropped_tokens"] == TIMM[kind][1]


def torchvision_vit():
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(32, 8, 2, 3, 24, 48, num_classes=5)


def test_torchvision_attention_is_that_of_its_own_queries_and_keys():
    model = small(torchvision_vit(), 32)
    view, said = model.view(image(size=(32, 32))), []
    hooks = [
        layer.ln_1.register_forward_hook(
            lambda _m, _i, out: said.append(out.detach())
        )
        for layer in model.module.encoder.layers
    ]
    logits = model.logits(view.pixels).detach()
    for hook in hooks:
        hook.remove()
    reading = read_attention(model, view.pixels, plan_of(model, view.pixels))
    torch.testing.assert_close(reading.outputs, logits, rtol=0, atol=1e-4)
    for at, (x, layer) in enumerate(
        zip(said, model.module.encoder.layers, strict=True)
    ):
        inner = layer.self_attention
        q, k, _ = (
            functional.linear(x[0], inner.in_proj_weight, inner.in_proj_bias)
            .reshape(17, 3, 3, 8)
            .permute(1, 2, 0, 3)
        )
        expected = [
            oracle.attend(*pair) for pair in zip(q.tolist(), k.tolist(), strict=True)
        ]
        np.testing.assert_allclose(reading.values(at)[0], expected, atol=1e-5)


def distilled():
    from timm.models.deit import VisionTransformerDistilled

    torch.manual_seed(0)
    return VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )


def beit():
    from timm.models.beit import Beit

    torch.manual_seed(0)
    return Beit(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        use_rel_pos_bias=True,
    )


def eva():
    from timm.models.eva import Eva

    torch.manual_seed(0)
    options = {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "num_reg_tokens": 4,
        "swiglu_mlp": True,
    }
    return Eva(
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=3,
        num_classes=5,
        **options,
    )


@pytest.mark.parametrize(
    ("make", "prefix", "rows"),
    [
        (torchvision_vit, 1, (0,)),
        (distilled, 2, (0, 1)),
        (beit, 1, tuple(range(1, 17))),
        (eva, 5, tuple(range(5, 21))),
    ],
    ids=["torchvision", "deit distilled", "beit", "eva"],
)
def test_other_families(make, prefix, rows):
    model = small(make(), 32)
    view = model.view(image(size=(32, 32)))
    logits = model.logits(view.pixels)
    plan = plan_of(model, view.pixels)
    assert plan.rows == rows
    torch.testing.assert_close(
        read_attention(model, view.pixels, plan).outputs, logits, rtol=0, atol=1e-4
    )
    for name in METHODS:
        found = api.explain(model, image(size=(32, 32)), name, target=1)
        assert grid_of(found).shape == (4, 4)
        assert found.provenance["dropped_tokens"] == prefix
        assert np.ptp(found.values) > 0


def swins():
    from timm.models.swin_transformer import SwinTransformer

    torch.manual_seed(0)
    yield SwinTransformer(
        img_size=64,
        patch_size=4,
        window_size=4,
        embed_dim=12,
        depths=(2, 2),
        num_heads=(2, 2),
        num_classes=5,
    )
    yield torchvision.models.SwinTransformer(
        [8, 8], 12, [2, 2], [2, 2], [4, 4], num_classes=5
    )


@pytest.mark.parametrize("at", [0, 1], ids=["timm", "torchvision"])
def test_windows_are_refused_and_a_window_as_large_as_the_grid_is_not(at):
    model = small(list(swins())[at], 64)
    sample = image(size=(64, 64))
    for name in METHODS:
        with pytest.raises(NotApplicable, match="groups"):
            api.explain(
                model,
                sample,
                "attention:layer=0" if name == "attention" else name,
                target=1,
            )
    small_image = small(list(swins())[at], 64)
    plan = plan_of(small_image, small_image.view(sample).pixels)
    assert [place.windows for place in plan.places] == (
        [16, 16, 4, 4] if at == 0 else [4, 4, 1, 1]
    )


def test_swins_last_attention_is_over_the_whole_grid():
    """Its mean over queries, from the module's own softmax, token by token on the grid."""
    model = small(list(swins())[1], 64)
    found = api.explain(model, image(size=(64, 64)), "attention", target=1)
    reading = read_attention(
        model,
        model.view(image(size=(64, 64))).pixels,
        plan_of(model, model.view(image(size=(64, 64))).pixels),
    )
    expected = reading.values(3)[0].mean(dim=(0, 1)).reshape(4, 4)
    np.testing.assert_allclose(grid_of(found), expected, rtol=1e-5)
    assert found.provenance["read_from"] == list(range(16))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("eva02_tiny_patch14_224", 1),
        ("vit_small_patch16_dinov3", 5),
    ],
)
def test_full_size_families(name, prefix):
    model = small(
        timm.create_model(name, pretrained=False),
        timm.get_pretrained_cfg(name).input_size[1],
    )
    for method in METHODS:
        found = api.explain(model, image(size=(224, 224)), method, target=1)
        assert found.provenance["dropped_tokens"] == prefix


# ---- relevance


@pytest.mark.parametrize("how", ["fused", "plain", "functional"])
@pytest.mark.parametrize("prefix", [1, 3])
def test_attnlrp_is_its_rules_in_loops(how, prefix):
    model = tiny(how=how, prefix=prefix)
    expected = oracle.Relevance(Twin(model.module), as_seen(model, image()), TARGET)
    found = api.explain(model, image(), "attnlrp", target=TARGET)
    colours = expected.pixels.sum(axis=0)
    np.testing.assert_allclose(
        found.values, colours, atol=1e-3 * np.abs(colours).max()
    )
    np.testing.assert_allclose(
        found.provenance["pixels_share"], colours.sum() / expected.logit, rtol=1e-2
    )


def test_attnlrp_conserves_the_logit():
    """Pixels, biases, embeddings and softmax's constant together are the logit."""
    model = tiny()
    found = oracle.Relevance(Twin(model.module), as_seen(model, image()), TARGET)
    assert found.pixels.sum() + found.elsewhere == pytest.approx(
        found.logit, rel=1e-9
    )


def test_attnlrp_of_a_linear_network_is_input_times_weight():
    """A limit: without biases every linear step hands on the whole of it."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.patches, self.head = (
                nn.Conv2d(3, 6, 4, stride=4, bias=False),
                nn.Linear(6, 4, bias=False),
            )

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            even = functional.scaled_dot_product_attention(
                torch.zeros_like(x), torch.zeros_like(x), x
            )
            return self.head(even.mean(dim=1) + x.mean(dim=1))

    model = wrap(Linear(), size=(8, 12), mean=(0, 0, 0), std=(1, 1, 1)).using(
        engine="torch"
    )
    found = api.explain(model, image(), "attnlrp", target=TARGET)
    # of the product of attention and values each factor has one half, and the attention
    # here depends on nothing
    assert found.provenance["pixels_share"] == pytest.approx(0.75, rel=1e-4)


def test_attnlrp_refuses_what_it_has_no_rule_for():
    class Odd(TinyViT):
        def forward(self, x):
            return super().forward(x).cumsum(dim=1)

    with pytest.raises(NotApplicable, match="no rule for cumsum"):
        api.explain(
            wrap(Odd(), size=(8, 12)).using(engine="torch"),
            image(),
            "attnlrp",
            target=TARGET,
        )


def test_attnlrp_refuses_what_the_rules_would_change():
    """A ReLU in place whose result is read from the tensor that it overwrote."""

    class Overwrites(TinyViT):
        def forward(self, x):
            said = super().forward(x)
            functional.relu_(said)
            return said

    with pytest.raises(NotApplicable, match="outputs change"):
        api.explain(
            wrap(Overwrites(), size=(8, 12)).using(engine="torch"),
            image(),
            "attnlrp",
            target=TARGET,
        )


@pytest.mark.parametrize("asks", [True, False])
def test_attnlrp_does_not_take_a_weight_for_something_the_image_decides(asks):
    """A scale that is reshaped before it is used: linear in the image, so nothing is
    halved.
    """

    class Scales(TinyViT):
        def __init__(self):
            super().__init__()
            self.gamma = nn.Parameter(torch.tensor([0.5, 2.0, 1.0, 3.0]))

        def forward(self, x):
            return super().forward(x) * self.gamma.view(1, 4)

    model = wrap(
        Scales().requires_grad_(asks),
        size=(8, 12),
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.25, 0.3),
    ).using(engine="torch")
    scaled, plain = (
        api.explain(one, image(), "attnlrp", target=TARGET).values
        for one in (model, tiny())
    )
    np.testing.assert_allclose(
        scaled, plain * model.module.gamma[TARGET].item(), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("how", ["fused", "plain", "functional"])
@pytest.mark.parametrize("prefix", [1, 3])
def test_transformer_attribution_is_its_rules_in_loops(how, prefix):
    model = tiny(how=how, prefix=prefix)
    twin, seen = Twin(model.module), as_seen(model, image())
    found = oracle.PositiveRelevance(twin, seen, TARGET)
    gradients = attention_gradients(twin, seen, TARGET)[1]
    for start, layers in (("0", [0, 1]), ("-1", [1])):
        matrix = oracle.attributed(
            [found.attentions[at] for at in layers], [gradients[at] for at in layers]
        )
        expected = expected_grid(matrix[0], model.module)
        ours = grid_of(
            api.explain(
                model,
                image(),
                f"transformer-attribution:start={start}",
                target=TARGET,
            )
        )
        # shares of sums near 0 lose digits in float32: the next test is the same in
        # float64
        np.testing.assert_allclose(ours, expected, atol=5e-3 * np.abs(expected).max())


def test_transformer_attribution_is_its_rules_in_loops_to_the_digit_in_float64(
    monkeypatch,
):
    """The case that float32 is worst at."""
    model, rollout = (
        tiny(prefix=1),
        registry.explainers.build("transformer-attribution:start=0"),
    )
    twin, seen = Twin(model.module), as_seen(model, image())
    found = oracle.PositiveRelevance(twin, seen, TARGET)
    attentions = [found.attentions[at] for at in (0, 1)]
    matrix = oracle.attributed(attentions, attention_gradients(twin, seen, TARGET)[1])
    model.layers()
    model.module.double()
    monkeypatch.setattr(type(model), "_checked", lambda self, pixels: pixels.double())
    view = model.view(image())
    ours = rollout.explain(
        model,
        replace(view, pixels=view.pixels.double()),
        ClassTarget(TARGET, "it", "logit"),
    )
    expected = expected_grid(matrix[0], model.module)
    np.testing.assert_allclose(
        ours.values.reshape(expected.shape),
        expected,
        atol=1e-6 * np.abs(expected).max(),
    )


def test_transformer_attribution_with_torchs_module_is_that_without():
    """The same weights in ``nn.MultiheadAttention`` and written out."""
    one, other = tiny(how="module"), tiny()
    for theirs, ours in zip(one.module.blocks, other.module.blocks, strict=True):
        ours.attn.qkv.weight.data = theirs.attn.inner.in_proj_weight.data
        ours.attn.qkv.bias.data = theirs.attn.inner.in_proj_bias.data
        ours.attn.proj.load_state_dict(theirs.attn.inner.out_proj.state_dict())
        for name in ("norm1", "norm2", "fc1", "fc2"):
            getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    for name in ("patches", "norm", "head"):
        getattr(other.module, name).load_state_dict(
            getattr(one.module, name).state_dict()
        )
    other.module.extra.data, other.module.places.data = (
        one.module.extra.data,
        one.module.places.data,
    )
    for name in ("transformer-attribution", "attnlrp"):
        maps = [
            api.explain(model, image(), name, target=TARGET).values
            for model in (one, other)
        ]
        np.testing.assert_allclose(maps[0], maps[1], rtol=1e-3, atol=1e-5)


def test_transformer_attribution_refuses_attention_that_pools():
    with pytest.raises(NotApplicable, match="pools"):
        api.explain(
            tiny(pool="map", prefix=0),
            image(),
            "transformer-attribution",
            target=TARGET,
        )


# ---- class activation maps on token grids

TOKENS = {
    **{
        kind: (lambda options=options: timm_vit(**options), prefix)
        for kind, (options, prefix, _) in TIMM.items()
    },
    "torchvision": (torchvision_vit, 1),
    "deit distilled": (distilled, 2),
    "beit": (beit, 1),
    "eva": (eva, 5),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_gradcam_on_tokens_is_that_of_the_raw_tokens(kind):
    """Tokens from a hook of one's own, the first ones dropped by hand, rows of the grid
    one after the other.
    """
    make, prefix = TOKENS[kind]
    model, said = small(make(), 32), []
    view, layer = model.view(image(size=(32, 32))), model.target_layer()
    part = dict(model.module.named_modules())[layer]
    hook = part.register_forward_hook(lambda _m, _i, out: said.append(out))
    logit = model.logits(view.pixels)[0, 1]
    hook.remove()
    (gradient,) = torch.autograd.grad(logit, said[-1])
    tokens, gradients = (
        said[-1][0, prefix:].detach().numpy(),
        gradient[0, prefix:].numpy(),
    )
    assert tokens.shape[0] == 16
    assert np.abs(gradients).max() > 0
    expected = np.zeros((4, 4))
    for at in range(16):
        expected[at // 4, at % 4] = sum(
            sum(row[channel] for row in gradients) / 16 * tokens[at, channel]
            for channel in range(tokens.shape[1])
        )
    found = api.explain(model, image(size=(32, 32)), "gradcam:relu=false", target=1)
    np.testing.assert_allclose(
        grid_of(found), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
    )
