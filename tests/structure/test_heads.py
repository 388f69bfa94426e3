"Heads of attention: found in networks that nobody here wrote, shut, taken out, and nothing else has changed"
import copy, warnings

import pytest, timm, torch, torchvision
from torch import nn
from timm.layers import Attention, AttentionRope
from timm.models import Eva, VisionTransformer

from hyperflux import Hyperflux
from hyperflux.deploy import compact
from hyperflux.structure import ATTENTION, Kind, channels, flops, heads

IMAGE, TOKENS, SEQUENCE = torch.randn(2, 3, 32, 32), torch.randn(2, 5, 24), torch.arange(14).view(2, 7)
SMALL = dict(vocab_size=50, hidden_size=24, num_attention_heads=6, intermediate_size=32, num_hidden_layers=1)


class Alone(nn.Module):
    "Attention of a sequence to itself"
    def __init__(self, attention, **how):
        super().__init__()
        self.attention, self.how = attention, how
    def forward(self, x): return self.attention(x, x, x, **self.how)[0]


def layer(heads=3, **kw): return nn.TransformerEncoderLayer(24, heads, 16, **kw)

def vit(depth=1, **kw):
    return VisionTransformer(img_size=32, patch_size=16, embed_dim=24, depth=depth, num_heads=3, num_classes=4, **kw)

def eva(**kw):
    how = dict(img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=3, num_classes=4, use_rot_pos_emb=True)
    return Eva(**how, scale_attn_inner=False, **kw)

def hugging(name, **more):
    transformers = pytest.importorskip('transformers')
    config = getattr(transformers, name + 'Config')(**SMALL, **more)
    return getattr(transformers, name + ('Model' if name == 'Bert' else 'ForCausalLM'))(config)


NETWORKS = { # → model, example, heads (or groups of heads) of each attention
    'MultiheadAttention': lambda: (Alone(nn.MultiheadAttention(24, 3)), TOKENS, [3]),
    'MultiheadAttention, batch first': lambda: (Alone(nn.MultiheadAttention(24, 4, batch_first=True)), TOKENS, [4]),
    'MultiheadAttention, no bias': lambda: (
        Alone(nn.MultiheadAttention(24, 3, bias=False), need_weights=False), TOKENS, [3]),
    'TransformerEncoderLayer': lambda: (layer(), TOKENS, [3]),
    'TransformerEncoder': lambda: (nn.TransformerEncoder(layer(4, batch_first=True), 2), TOKENS, [4, 4]),
    'torchvision': lambda: (torchvision.models.VisionTransformer(32, 16, 1, 3, 24, 32, num_classes=4), IMAGE, [3]),
    'timm vit_tiny': lambda: (timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1), IMAGE, [3]),
    'timm deit': lambda: (timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, depth=1), IMAGE, [3]),
    'timm, norm of queries': lambda: (vit(qk_norm=True), IMAGE, [3]),
    'timm, gated': lambda: (Attention(24, 3, gated=True, qkv_bias=True), TOKENS, [3]),
    'timm, shared keys': lambda: (AttentionRope(24, 6, num_kv_heads=3, qkv_fused=False), TOKENS, [3]),
    'timm eva, rotated': lambda: (eva(attn_type='rope', num_kv_heads=3), IMAGE, [3]),
    'Bert': lambda: (hugging('Bert'), dict(input_ids=SEQUENCE, attention_mask=torch.ones(2, 7)), [6]),
    'Llama': lambda: (hugging('Llama', num_key_value_heads=3), dict(input_ids=SEQUENCE, use_cache=False), [3]),
}

def outputs(model, example):
    "The first tensor that a model gives"
    with torch.no_grad(): out = model(**example) if isinstance(example, dict) else model(example)
    return out if isinstance(out, torch.Tensor) else out[0]

def shut(model, groups, gate): # → gates
    "Sets all that hangs on one gate of each bank to zero"
    gates, start = torch.ones(sum(b.n for b in groups.banks)), 0
    for bank in groups.banks:
        gates[start + gate] = 0
        start += bank.n
    params = dict(model.named_parameters())
    for m in groups.members:
        z = torch.cat([gates, torch.ones(1)])[m.index]
        with torch.no_grad(): params[m.name].mul_(z)
    return gates


@pytest.mark.parametrize('name', NETWORKS)
def test_a_head_that_is_shut_is_taken_out(name):
    "One head of each attention is zero in the output: rows and columns go, outputs stay, operations are what was said"
    torch.manual_seed(0)
    model, example, expected = NETWORKS[name]()
    model.eval()
    for p in model.parameters():                                            # biases of zero would hide a wrong one
        if p.ndim == 1: nn.init.normal_(p, std=.3)
    groups = heads(model, example)
    assert [b.n for b in groups.banks] == expected
    gates = shut(model, groups, 1)
    before = outputs(model, example)
    small, report = compact(model, example)
    assert report.views
    assert (outputs(small, example) - before).abs().max() <= 1e-5*before.abs().max()
    left = heads(small, example)
    assert [b.n for b in left.banks] == [n - 1 for n in expected]
    assert left.cost(flops).whole == groups.cost(flops).left(gates).item() < groups.cost(flops).whole
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize('name, build, reason', [
    ('one norm for all heads', lambda: Attention(24, 3, scale_norm=True, norm_layer=nn.LayerNorm), 'layer_norm'),
    ('a class that is not known', lambda: type('Mine', (Attention,), {})(24, 3), 'Mine, which is not in ATTENTION'),
    ('a width that is written into its code', lambda: timm.models.eva.EvaAttention(24, 3, scale_norm=False),
     'EvaAttention, which is not in ATTENTION'),
    ('heads that are mixed', lambda: timm.models.cait.TalkingHeadAttn(24, 3), 'TalkingHeadAttn, which is not'),
])
def test_attention_that_is_not_followed_is_refused_by_name(name, build, reason):
    "Its heads stay, and the error says why"
    with pytest.raises(ValueError, match=f'no head of this model can go: .*{reason}'): heads(build(), TOKENS)


def test_weights_averaged_over_heads_keep_all_heads():
    "Attention weights among the outputs are means over heads, which change when one goes"
    class Both(Alone):
        def forward(self, x): return self.attention(x, x, x)
    model = Both(nn.MultiheadAttention(24, 3))
    with pytest.raises(ValueError, match='no head of this model can go: .*mean'): heads(model, TOKENS)


def test_a_class_of_ones_own_takes_one_line():
    "In the table its heads are found and taken out"
    Mine = type('Mine', (Attention,), {})
    name = f'{Mine.__module__}.{Mine.__qualname__}'
    ATTENTION[name] = Kind(width=('attn_dim',))
    try:
        model = Mine(24, 3).eval()
        shut(model, heads(model, TOKENS), 0)
        small, _ = compact(model, TOKENS)
    finally: del ATTENTION[name]
    assert (small.num_heads, small.attn_dim, small.head_dim) == (2, 16, 8)
    torch.testing.assert_close(small(TOKENS), model(TOKENS), atol=1e-6, rtol=1e-5)


def test_heads_that_single_weights_have_emptied_go():
    "Nobody asked for heads: a pruner of single weights left none in the columns of one"
    model = layer(batch_first=True).eval()
    with torch.no_grad(): model.self_attn.out_proj.weight[:, 8:16] = 0
    small, _ = compact(model, TOKENS)
    assert small.self_attn.num_heads == 2 and small.self_attn.in_proj_weight.shape == (48, 24)


def test_the_last_head_stays():
    "An attention that no head speaks in keeps one, so that it can be run; with a bias, it is no branch that can go"
    model = vit(2).eval()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
        model.blocks[0].attn.proj.bias.fill_(.1)
    small, _ = compact(model, IMAGE)
    assert [b.attn.num_heads for b in small.blocks] == [1, 3]
    torch.testing.assert_close(small(IMAGE), model(IMAGE), atol=1e-6, rtol=1e-5)


def test_heads_and_channels_are_one_grouping():
    "Both kinds of banks under one cost, and heads=False leaves the channels"
    both, alone = channels(vit(2), IMAGE), channels(vit(2), IMAGE, heads=False)
    assert [b.n for b in both.banks] == [3, 96, 3, 96] and [b.n for b in alone.banks] == [96, 96]
    assert both.cost(flops).whole == alone.cost(flops).whole
    assert alone.cost(flops).left(torch.zeros(192)) > both.cost(flops).left(torch.zeros(198))


def test_the_smaller_encoder_trains_and_takes_masks():
    "In training mode, with sequences that end early, it is the encoder with a dead head"
    torch.manual_seed(0)
    model = nn.TransformerEncoder(layer(4, batch_first=True, dropout=0.), 2).eval()
    shut(model, heads(model, TOKENS), 2)
    small, _ = compact(model, TOKENS)
    late = torch.tensor([[False]*5, [False]*3 + [True]*2])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                 # of nested tensors, which the whole one uses
        with torch.no_grad(): a, b = (m(TOKENS, src_key_padding_mask=late)[~late] for m in (model, small))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    model.train(); small.train()
    torch.testing.assert_close(small(TOKENS), model(TOKENS), atol=1e-5, rtol=1e-4)
    small(TOKENS).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_the_model_itself_is_left_as_it_is():
    "Finding heads and taking them out change no weight, no mode and no number"
    model = vit().train()
    shut(model, heads(model, IMAGE), 0)
    before = copy.deepcopy(model.state_dict())
    compact(model, IMAGE)
    assert model.training and model.blocks[0].attn.num_heads == 3
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


def test_a_cache_is_refused_with_what_to_do():
    "A language model that gives its cache cannot be followed; the error says how to leave it out"
    model = hugging('Llama', num_key_value_heads=3)
    with pytest.raises(RuntimeError, match='use_cache=False'): heads(model, dict(input_ids=SEQUENCE))


def test_the_table_has_only_what_has_weights():
    "Products of queries with keys cost operations, and have no row of their own"
    model = vit(2)
    optimizer = torch.optim.SGD(model.parameters(), .1)
    pruner = Hyperflux(model, optimizer, sparsity=.3, steps=200, groups=channels(model, IMAGE), cost=flops)
    rows = pruner.layers()
    assert all(r['weights'] > 0 for r in rows)
    assert rows[-1]['weights'] == sum(r['weights'] for r in rows[:-1])
