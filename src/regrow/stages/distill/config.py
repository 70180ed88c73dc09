"""The fields of the distill stage."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from regrow import plugins
from regrow.config import Config
from regrow.quantization import formats

LOSSES = "regrow.training.losses"
FEATURE_LOSSES = "regrow.training.feature_losses"
LAST = "last"
"""The value of chosen_by that keeps the last checkpoint."""


class DistillConfig(Config):
    """Budget, losses and schedule of a distillation."""

    tokens: int = Field(default=1_000_000, ge=1)
    """Tokens to train on; a larger number later extends a finished run."""
    batch_tokens: int = Field(default=512, ge=1)
    """Tokens per optimizer step, over all devices and micro-batches; use more for longer runs."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of AdamW. None: 5e-4 times the root mean square of the matrices in the
    student's middle layer (1e-4 for SmolLM2, 2e-5 for Gemma 3 270M); 1e-4 for adapters and for
    a student with random weights: a config.json, or a model from `regrow initialize`."""
    attention_rate: float = Field(default=1.0, gt=0)
    """Learning rate of attention and norms, as a share of `learning_rate`."""
    embedding_rate: float = Field(default=1.0, gt=0)
    """Learning rate of the embedding and the head, as a share of `learning_rate`."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """The final learning rate of the cosine schedule, as a share of the peak."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak; at least one step."""
    optimizer: Literal["adamw", "adamw_8bit", "adamw_bf16"] = "adamw"
    """adamw takes 16 bytes for each trained weight (weights, gradients and moments in float32);
    adamw_8bit has its moments in 8 bits and takes 10; adamw_bf16 also has weights and gradients in
    bfloat16, with stochastic rounding, and takes 6. The last two need torchao."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    beta2: float = Field(default=0.95, gt=0, lt=1)
    """AdamW's decay rate of the second moment. 0.999 gave the same result in runs of a hundred
    steps."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    losses: dict[str, float] = Field(default_factory=lambda: {"forward_kl": 1.0})
    """Weight of each output loss by its name: forward_kl, reverse_kl, jsd, skewed_kl,
    skewed_reverse_kl, total_variation, cross_entropy (hard labels), or one of your own."""
    chosen_by: Literal["forward_kl", "cross_entropy", "last"] = "forward_kl"
    """The held-out loss that chooses the checkpoint to keep. cross_entropy is for a student that
    learns the text alone (`losses: {cross_entropy: 1}`); the teacher then does not run at all. last
    keeps the last one, for a student that learns answers as hard labels: the more of them it
    learns, the further it is from the teacher on other text."""
    temperature: float = Field(default=1.0, gt=0)
    """T: both models' logits are divided by T, and the losses multiplied by T², in all losses
    except cross_entropy."""
    beta: float = Field(default=0.5, ge=1e-3, le=0.999)
    """β of jsd, which is β · KL(teacher ‖ M) + (1 − β) · KL(student ‖ M) with
    M = β · teacher + (1 − β) · student."""
    skew: float = Field(default=0.1, ge=1e-3, le=0.999)
    """α of skewed_kl, which is KL(teacher ‖ α · teacher + (1 − α) · student), and of
    skewed_reverse_kl, which is KL(student ‖ (1 − α) · teacher + α · student)."""
    exact_head: bool = False
    """Compute the products of the output head as exactly as in float32: the relative error of the
    losses' gradients falls from 2e-2 to 1e-4. On a CPU, head and loss take about twice the time."""
    feature_losses: dict[str, float] = Field(default={})
    """Weight of each feature loss, which is added to `losses`, by its name: hidden, hidden_cosine,
    embeddings, attention, logit_lens, logit_lens_symmetric."""
    lens_layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)
    """Layers that the logit lens reads: shares of the student's depth, or layer numbers from 0."""
    fake_quantize: str | None = None
    """Scheme (int8, int4, int4-g32, …) to whose grid the layers' weights are rounded in training.
    The student is written in float32 with weights on that grid; `quantize` it with the method
    rtn."""
    balance_feature_losses: bool = False
    """Multiply the weight of each feature loss by (running mean of `losses` ÷ its running mean)."""
    eval_tokens: int | None = Field(default=None, ge=1)
    """Training tokens between two measurements of the held-out KL, each with a checkpoint. By
    default a fortieth of `tokens`, and at least 25,000 tokens and 10 steps."""
    heldout_sequences: int = Field(default=16, ge=1)
    """Sequences of the validation split on which the held-out KL is measured."""
    cache: str | None = None
    """A folder of `regrow cache`, which replaces the teacher: only the teacher's head is loaded. A
    recipe uses the last cache stage before this one."""
    teacher_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """Dtype of the teacher's linear layers. int8 (one scale per row) takes half the memory and
    hardly changes the teacher's distribution."""
    extra_teachers: dict[str, float] = Field(default={})
    """More teachers (folder or hub id) with the same tokens, each with its share of the target
    distribution; the first teacher's share is the rest. {other: 0.3} means
    0.7 p_teacher + 0.3 p_other."""
    cross_tokenizer: Literal["refuse", "spans"] = "refuse"
    """refuse: a teacher with another tokenizer raises an error. spans: all losses except
    cross_entropy compare the probabilities of text spans whose boundaries both tokenizers share."""
    span_temperature: float = Field(default=100.0, gt=0)
    """τ: probabilities of spans are raised to the power 1/τ, so that unlikely spans also count."""
    answers: str | None = None
    """A folder of `regrow generate` with the teacher's answers, which replace the text to train on;
    the held-out KL is still measured on the data. A recipe uses the last generate stage by the
    teacher before this one."""
    answer_targets: Literal["teacher", "top_logprobs"] = "teacher"
    """Where the distributions on `answers` come from: the teacher, which reads them, or the
    log-probabilities that are stored with them (generate --top-logprobs), for a teacher that only
    answers from a server. The held-out KL is then still that to the teacher."""
    own_answers: str | None = None
    """A folder of `regrow generate` with the student's answers, which are added to the text to
    train on, with own_losses. A recipe uses a generate stage by this student before this one."""
    own_losses: dict[str, float] = Field(default_factory=lambda: {"skewed_reverse_kl": 1.0})
    """Weight of each loss, by its name, on the student's own answers."""
    own_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the student's own answers in the training tokens."""
    on_policy_share: float = Field(default=0.0, ge=0, le=1)
    """Share of the training sequences in which the student itself writes, during the training: it
    continues prompts, and the teacher scores each token that it wrote. 0 trains on text alone."""
    on_policy_losses: dict[str, float] = Field(default_factory=lambda: {"reverse_kl": 1.0})
    """Weight of each loss, by its name, on the tokens that the student writes."""
    on_policy_prompts: str | None = None
    """The prompts (a file, a folder, …) that the student continues. Without them, it continues the
    prompts of the training text, or the first on_policy_prompt_tokens of each plain passage."""
    on_policy_prompt_tokens: int = Field(default=32, ge=1)
    """Tokens of a plain passage that the student reads before it writes."""
    on_policy_new_tokens: int = Field(default=96, ge=1)
    """The maximum number of tokens that the student writes after a prompt."""
    on_policy_temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The temperature at which the student writes."""
    on_policy_steps: int = Field(default=8, ge=1)
    """Optimizer steps for which the student writes at once. 1 is strictly on-policy; larger numbers
    write in larger batches, which is faster. It also writes anew after each measurement."""
    adapter: Literal["none", "lora", "qlora"] = "none"
    """none trains all weights; lora trains low-rank adapters beside frozen weights and merges them
    in the result; qlora does the same with frozen weights in 4 bits."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The product of an adapter's two matrices is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of linear layers that get adapters, such as q_proj; all of them when empty."""
    keep_adapters: bool = False
    """Also write the adapters, in `adapter/` beside the merged model, in peft's format."""
    freeze_layers: int = Field(default=0, ge=0)
    """Freeze the embedding (and a head tied to it) and the first N layers. This is faster. If only
    later layers were cut, the frozen layers are the teacher's, and then run once for both
    models."""
    dynamic_blend: bool = False
    """Change the shares of the sources at each measurement (eval_tokens): a source whose
    held-out loss is further above its reference gets more. The sources' weights are the first
    shares."""
    reference_losses: tuple[float, ...] = ()
    """For dynamic_blend: a loss for each source, in their order, in nats per token. Without them,
    the teacher's own losses are measured at the start."""
    keep_zeros: bool = True
    """Keep the zeros of a sparse student (one that sparsify made, or with 30 % of zeros in the
    matrices of its layers). Otherwise training fills them, and the result is dense."""
    seed: int = 0
    """Seed of dropout and of random initial weights (of a config.json, or of adapters)."""

    @model_validator(mode="after")
    def _measured(self) -> DistillConfig:
        if self.chosen_by not in {"forward_kl", LAST, *self.losses}:
            raise ValueError(
                f"chosen_by {self.chosen_by}: it must be last, or one of the losses "
                f"({', '.join(self.losses)})"
            )
        return self

    @field_validator("losses", "own_losses", "on_policy_losses")
    @classmethod
    def _known_losses(cls, losses: dict[str, float]) -> dict[str, float]:
        return plugins.check_weights(LOSSES, "loss", losses)

    @field_validator("feature_losses")
    @classmethod
    def _known_feature_losses(cls, feature_losses: dict[str, float]) -> dict[str, float]:
        if not feature_losses:
            return feature_losses
        return plugins.check_weights(FEATURE_LOSSES, "feature loss", feature_losses)

    @field_validator("fake_quantize")
    @classmethod
    def _weights_alone(cls, name: str | None) -> str | None:
        if name is None:
            return None
        scheme = formats.find_scheme(name)
        if scheme.dynamic:
            raise ValueError(f"{scheme.name} also rounds inputs; give int8 or a kind of int4")
        return scheme.name

    @field_validator("extra_teachers")
    @classmethod
    def _shares(cls, shares: dict[str, float]) -> dict[str, float]:
        if not all(share > 0 for share in shares.values()) or not sum(shares.values()) < 1:
            raise ValueError(
                f"the shares {list(shares.values())} must be above 0 and sum to less than 1: the "
                "teacher has the rest"
            )
        return shares

    @field_validator("lens_layers")
    @classmethod
    def _depths(cls, depths: tuple[int | float, ...]) -> tuple[int | float, ...]:
        for depth in depths:
            if depth < 0 or (isinstance(depth, float) and not 0 < depth < 1):
                raise ValueError(
                    f"{depth} is no depth: give shares between 0 and 1, or layer numbers from 0"
                )
        if not depths:
            raise ValueError("give at least one depth, or leave out the logit_lens feature losses")
        return depths
