"""LoRA of a causal language model: tried, proved and bought while the contributor hides it."""

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from paris_ray.errors import BudgetError, BundleError, SignatureError
from paris_ray.identity import Identity
from paris_ray.signatures import SignedDocument
from paris_ray.zklora.adapter import read_peft
from paris_ray.zklora.calls import Request
from paris_ray.zklora.fixed_point import Int16, Int64, evaluate
from paris_ray.zklora.inference import adapt, trace_calls
from paris_ray.zklora.language import base_of_model
from paris_ray.zklora.log import Call, closing_statement
from paris_ray.zklora.offer import AskedTerms, open_offer
from paris_ray.zklora.parties.evidence import ClosedSession, Evidence
from paris_ray.zklora.proof import prove, verify_named
from paris_ray.zklora.sessions import SessionJournal
from paris_ray.zklora.transcript import Transcript, new_nonce, proof_context

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY, WIDTH, RANK = 50, 32, 2
ATTENTION, MLP = ("attn.c_attn", "attn.c_proj"), ("mlp.c_proj",)
PROMPT = torch.tensor([[7, 3, 41, 12, 9]])


class Contributor:
    """An offer and its budget, without a network."""

    def __init__(self, folder: Path, adapter: Path, base: Path, budget_rows: int) -> None:
        self.identity = Identity.create(folder)
        terms = AskedTerms(base=base_of_model(base), name=adapter.name, budget_rows=budget_rows)
        offer = open_offer(folder / "offer", self.identity, read_peft(adapter), terms)
        self.manifest, self.openings = offer.manifest, offer.openings()
        self.journal = SessionJournal(folder / "sessions.sqlite")
        self.journal.budget.add_adapter(self.manifest.adapter_id, self.manifest.terms, budget_rows)


class InProcessSession:
    """What user and contributor remember of one session, without a network between them."""

    def __init__(self, user: Identity, contributor: Contributor) -> None:
        self.user, self.contributor, self.transcript = user, contributor, Transcript()
        manifest = contributor.manifest
        self.nonces = new_nonce(), new_nonce()
        self.sid = manifest.session_id(*self.nonces)
        contributor.journal.open_session(
            self.sid, manifest.adapter_id, user.public_key, *self.nonces
        )

    def evaluate(self, name: str, x: Int16, exponent: int) -> Int64:
        contributor, seq = self.contributor, len(self.transcript)
        module = contributor.openings[name].module
        (y,) = contributor.journal.record_calls(
            self.sid,
            self.user.public_key,
            seq,
            [Request(name, exponent, x)],
            lambda: [evaluate(module, x)],
        )
        self.transcript.append(Call(seq, name, exponent, x, y))
        return y

    def adapt(self, model: nn.Module) -> nn.Module:
        manifest = self.contributor.manifest
        return adapt(model, manifest.terms, manifest.scale, self.evaluate)

    def prove(self) -> Evidence:
        """The contributor proves what its journal has, of what both have signed."""
        contributor, manifest = self.contributor, self.contributor.manifest
        statement = closing_statement(self.sid, manifest.adapter_id, self.transcript.log)
        by_user = SignedDocument.sign("close", statement, self.user)
        signed = contributor.journal.close(
            self.sid, self.user.public_key, by_user, contributor.identity
        ).signed
        nonce_v, recorded = new_nonce(), contributor.journal.calls.log(self.sid)
        proofs = {}
        for name, opening in contributor.openings.items():
            context = proof_context(manifest.adapter_id, self.sid, recorded.root, name, nonce_v)
            proofs[name] = prove(opening, *contributor.journal.calls.rows(self.sid, name), context)
        closed = ClosedSession(self.sid, *self.nonces, *signed, nonce_v, self.transcript)
        return Evidence(closed, proofs)


@pytest.fixture
def base(tmp_path: Path) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    return model


def with_lora(
    model: nn.Module, folder: Path, *targets: str, seed: int = 1
) -> peft.PeftModelForCausalLM:
    """Write a LoRA with random weights; return what PEFT makes of it."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=4, target_modules=list(targets), fan_in_fan_out=True,
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    theirs = get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(folder)
    return theirs


def offered(folder: Path, name: str, budget_rows: int = 64) -> Contributor:
    return Contributor(folder / f"{name}_home", folder / name, folder / "base", budget_rows)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits[0]


def perplexity(model: nn.Module) -> float:
    return nn.functional.cross_entropy(logits(model)[:-1], PROMPT[0, 1:]).exp().item()


def generate(model: nn.Module, use_cache: bool = True) -> list[int]:
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    output = model.generate(
        input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), use_cache=use_cache, **options
    )
    return output[0].tolist()


def test_the_users_side_needs_no_ray() -> None:
    parties = "parties.session", "parties.purchase", "parties.escrow", "parties.checking"
    modules = "inference", "offer", "subjects", *parties
    imports = "; ".join(f"import paris_ray.zklora.{name}" for name in modules)
    check = "import sys; assert 'ray' not in sys.modules, 'ray was imported'"
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True, cwd=REPOSITORY)


def test_processes_that_hold_no_model_import_no_torch() -> None:
    """Each of Ray's workers would take seconds, and hundreds of megabytes, for it."""
    imports = "; ".join(
        f"import paris_ray.zklora.parties.{name}" for name in ("workers", "gateway")
    )
    check = "import sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", f"{imports}; {check}"], check=True, cwd=REPOSITORY)


def test_the_terms_have_the_dimensions_of_conv1d(base: GPT2LMHeadModel, tmp_path: Path) -> None:
    with_lora(base, tmp_path / "lora", *ATTENTION, *MLP)
    terms = offered(tmp_path, "lora").manifest.terms
    found = {
        name: module for name, module in base.named_modules() if name.endswith(ATTENTION + MLP)
    }
    assert terms.keys() == found.keys() and len(terms) == 6
    for name, module in found.items():
        d_in, d_out = module.weight.shape  # the other way round than nn.Linear
        assert terms[name].dimensions == (d_in, RANK, d_out)
    transposed = {"transformer.h.0.mlp.c_fc": terms["transformer.h.0.mlp.c_proj"]}
    with pytest.raises(BundleError, match="has d_in=128, d_out=32, the model d_in=32, d_out=128"):
        adapt(base, transposed, 1.0, lambda *_: pytest.fail("nothing may be sent"))


def test_with_a_cache_each_token_costs_one_row(base: GPT2LMHeadModel, tmp_path: Path) -> None:
    theirs = with_lora(base, tmp_path / "lora", *ATTENTION, *MLP)
    cached = PROMPT.shape[1] + 5  # the last new token is never an input
    contributor = offered(tmp_path, "lora", budget_rows=2 * cached)
    user, manifest = Identity.create(tmp_path / "user"), contributor.manifest
    counts = trace_calls(base, manifest.terms, generate).rows
    assert counts == dict.fromkeys(manifest.terms, cached)
    uncached = trace_calls(base, manifest.terms, lambda view: generate(view, use_cache=False)).rows
    assert set(uncached.values()) == {5 + 6 + 7 + 8 + 9 + 10}

    session = InProcessSession(user, contributor)
    assert generate(session.adapt(base)) == generate(theirs) != generate(base)
    assert session.transcript.log.rows == counts
    assert set(contributor.journal.budget.rows_left(manifest.adapter_id).values()) == {cached}
    evidence = session.prove()
    verify_named(evidence.claims(manifest))

    with pytest.raises(BudgetError, match="c_attn"):  # comes out of the middle of a generation
        generate(InProcessSession(user, contributor).adapt(base), use_cache=False)


def test_contributors_of_disjoint_modules_are_tried_together(
    base: GPT2LMHeadModel, tmp_path: Path
) -> None:
    targets = {"attention": ATTENTION, "mlp": MLP}
    for name, modules in targets.items():
        with_lora(base, tmp_path / name, *modules)
    both = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "attention", "attention")
    both.load_adapter(tmp_path / "mlp", "mlp")
    both.base_model.set_adapter(["attention", "mlp"])

    user = Identity.create(tmp_path / "user")
    sessions = [InProcessSession(user, offered(tmp_path, name)) for name in targets]
    view: nn.Module = base
    for session in sessions:
        view = session.adapt(view)
    assert perplexity(view) == pytest.approx(perplexity(both.eval()), rel=1e-3)
    assert perplexity(view) != pytest.approx(perplexity(base), rel=1e-2)
    evidence = [session.prove() for session in sessions]
    for part, session in zip(evidence, sessions, strict=True):
        manifest = session.contributor.manifest
        rows = set(part.closed.transcript.log.rows.values())
        assert rows == {2 * PROMPT.shape[1]}  # perplexity, twice
        verify_named(part.claims(manifest))
    first, second = (session.contributor.manifest for session in sessions)
    assert not first.terms.keys() & second.terms.keys()
    with pytest.raises(SignatureError, match=f"is signed by .*, not by {second.contributor}"):
        evidence[0].claims(second)
    with pytest.raises(BundleError, match="UpdatedLinear is not allowed"):
        sessions[0].adapt(view)  # nobody else may answer for a module of the view
