"""Our decoder against `transformers`, the loss against torch, the counts against the built model."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from aifactory_train.errors import RecipeError
from aifactory_train.models.attention import attend, build_mask
from aifactory_train.models.build import init_weights
from aifactory_train.models.decoder import Decoder
from aifactory_train.models.loss import IGNORE, ChunkLoss, cross_entropy_sum
from aifactory_train.plan import shape
from aifactory_train.recipe.huggingface import own_config
from aifactory_train.recipe.schema import Model
from aifactory_train.strictyaml import configs_dir, read_yaml
from training_runs import MODEL

SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len_tokens": 32}
FAMILIES = {
    "llama": {},
    "llama-scaled-tied": {"rope_scaling": SCALING, "tied_embeddings": True},
    "mistral": {"family": "mistral", "head_size": 8},
    "qwen2": {"family": "qwen2", "tied_embeddings": True},
    "qwen3": {"family": "qwen3", "head_size": 32, "tied_embeddings": True},
}


def build(name: str) -> Model:
    return Model(**{**MODEL, **FAMILIES[name]})


def huggingface_twin(model: Model):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = own_config(model)
    config = AutoConfig.for_model(config.pop("model_type"), **config, attn_implementation="eager")
    torch.manual_seed(1)
    twin = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms of 1 would hide a weight in the wrong place
        for parameter in twin.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return twin


def our_twin(model: Model, twin) -> Decoder:
    ours = Decoder(model)
    state = twin.state_dict()
    if model.tied_embeddings:
        state.pop("lm_head.weight", None)
    ours.load_state_dict(state, strict=True)
    return ours


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_key_names_equal_those_of_transformers(name):
    model = build(name)
    twin = huggingface_twin(model)
    ours = our_twin(model, twin)
    tokens = torch.randint(0, model.vocab_size, (2, 100))
    difference = (ours(tokens) - twin(tokens).logits).abs().max().item()
    assert difference < 1e-5
    scaled = twin(tokens + 0).logits.std().item()
    assert scaled > 0.1, "logits near zero would equal anything"


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_the_loss_equal_those_of_transformers(name):
    model = build(name)
    twin = huggingface_twin(model)
    ours = our_twin(model, twin)
    tokens, targets = torch.randint(0, model.vocab_size, (2, 2, 60))
    targets[0, :7] = IGNORE
    ours(tokens, targets).backward()
    F.cross_entropy(twin(tokens).logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    theirs = dict(twin.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[key].grad, rtol=1e-4, atol=2e-5)


def test_documents_of_a_row_do_not_see_each_other():
    ours = Decoder(build("qwen3"))
    init_weights(dict(ours.named_parameters()), ours.shape, 0)
    a, b = torch.randint(0, 512, (1, 11)), torch.randint(0, 512, (1, 21))
    document = torch.tensor([[0] * 11 + [1] * 21], dtype=torch.int32)
    position = torch.cat((torch.arange(11), torch.arange(21)))[None]
    packed = ours(torch.cat((a, b), 1), None, document, position)
    torch.testing.assert_close(packed, torch.cat((ours(a), ours(b)), 1), rtol=1e-5, atol=1e-6)
    together = ours(torch.cat((a, b), 1))
    assert (together - packed).abs().max() > 1e-4, "without the mask the second document sees the first"


def test_loss_in_chunks_equals_the_whole_loss_and_its_gradients():
    torch.manual_seed(0)
    n_tokens = 2 * shape.LOSS_CHUNK_TOKENS + 77
    hidden = torch.randn(n_tokens, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=True)
    target = torch.randint(0, 40, (n_tokens,))
    target[::5] = IGNORE
    loss = cross_entropy_sum(hidden, weight, target, ChunkLoss())
    (loss * 0.3).backward()
    ours = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    whole = F.cross_entropy(hidden @ weight.T, target, reduction="sum", ignore_index=IGNORE)
    (whole * 0.3).backward()
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours[0], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours[1], weight.grad, rtol=1e-5, atol=1e-5)


def test_loss_never_holds_the_full_logits():
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    biggest = max(biggest, tensor.numel())
            return out

    hidden = torch.randn(4 * shape.LOSS_CHUNK_TOKENS, 8, requires_grad=True)
    weight = torch.randn(100, 8, requires_grad=True)
    with Watch():
        cross_entropy_sum(
            hidden, weight, torch.zeros(4 * shape.LOSS_CHUNK_TOKENS, dtype=torch.int64), ChunkLoss()
        ).backward()
    assert biggest == shape.LOSS_CHUNK_TOKENS * 100


@pytest.mark.parametrize("path", sorted((configs_dir() / "models").glob("*.yaml")), ids=lambda p: p.stem)
def test_counted_parameters_equal_the_built_model(path):
    model = Model(**read_yaml(path, {}, RecipeError)["model"])
    with torch.device("meta"):
        decoder = Decoder(model)
    assert shape.n_parameters(model) == sum(p.numel() for p in decoder.parameters())
    matrices = [p for n, p in decoder.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    head = model.vocab_size * model.hidden_size if model.tied_embeddings else 0
    assert shape.n_matmul_parameters(model) == sum(p.numel() for p in matrices) + head


def test_counted_flops_equal_torchs_counter():
    model, rows, tokens = build("llama"), 2, 64
    decoder = Decoder(model)
    init_weights(dict(decoder.named_parameters()), decoder.shape, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decoder(torch.zeros(rows, tokens, dtype=torch.int64))
    # The counter sees both halves of the attention matrix, model_causal_v1 the causal half.
    causal_half = 2 * tokens * model.n_heads * model.head_size * model.n_layers
    ours = shape.model_flops_per_token(model, tokens) / 3 + causal_half
    assert counter.get_total_flops() == ours * rows * tokens


def test_initial_weights_depend_on_seed_and_name_only():
    one, two, other = (Decoder(build("llama")) for _ in range(3))
    torch.manual_seed(5)
    init_weights(dict(one.named_parameters()), one.shape, 3)
    torch.manual_seed(6)
    init_weights(dict(two.named_parameters()), two.shape, 3)
    init_weights(dict(other.named_parameters()), other.shape, 4)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name
    first, second = one.model.layers.values()
    assert not torch.equal(first.mlp.up_proj.weight, second.mlp.up_proj.weight)
    assert abs(first.mlp.up_proj.weight.std().item() - 0.02) < 0.001
    assert abs(first.mlp.down_proj.weight.std().item() - 0.02 / 2) < 0.001


@pytest.mark.parametrize("n_tokens", [50, 130, 1100])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_equals_that_of_torch(n_tokens, documents):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n_tokens, 16, requires_grad=True) for heads in (6, 2, 2))
    document = torch.arange(n_tokens)[None].expand(2, -1) // 37 if documents else None
    grad = torch.randn(2, 6, n_tokens, 16)
    mask = build_mask(document)
    dense = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril() if mask is None else mask
    twice = (x.repeat_interleave(3, dim=1) for x in (k, v))
    expected = F.scaled_dot_product_attention(q, *twice, attn_mask=dense)
    ours = attend(q, k, v, mask)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
