"""What asks the model or the endpoint, and keeps what is finished."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint
from regrow.checkpoint.licence import Licence
from regrow.config import Options
from regrow.data.prompts import Prompt
from regrow.runtime import distributed, vllm_server
from regrow.runtime.batch_generator import BatchGenerator, Sampling
from regrow.runtime.rows import Rows
from regrow.stages.generate import GenerateConfig
from regrow.stages.generate.endpoint import Endpoint
from regrow.stages.generate.keep import fault
from regrow.stages.generate.local import Asked, answer_locally, judge
from regrow.stages.generate.remote import answer_remotely
from regrow.stages.generate.self_prompts import MOST_TOKENS, write_prompts
from regrow.training.shared_tokens import shared_ids


@dataclass
class Work:
    """The model, which is loaded once and only if it is needed, and how it is asked."""

    checkpoint: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    config: GenerateConfig
    options: Options
    model: Any = None
    served: str = ""
    """The endpoint's name of its model."""
    engine: str = "vLLM"
    """With backend vllm, its name, and its version if it was started."""

    def loaded(self) -> Any:
        """The model."""
        if self.model is None:
            device = self.options.torch_device()
            dtype = self.checkpoint.compute_dtype(device)
            self.model = self.checkpoint.model(dtype, device)
        return self.model

    @property
    def vocab_size(self) -> int:
        """The number of ids that may be in an answer; further rows of the embedding are padding."""
        return shared_ids(self.checkpoint, self.tokenizer)

    def self_written(self, folder: Path) -> Asked:
        """The prompts that the model writes."""
        rows, config = _shared(folder, "prompts"), self.config
        sampling = Sampling(
            MOST_TOKENS,
            config.temperature,
            config.top_p,
            config.seed,
            vocab_size=self.vocab_size,
        )
        generator = BatchGenerator(self.loaded(), self.tokenizer, sampling)
        found = write_prompts(rows, generator, self.tokenizer, config.self_prompts, config.seed)
        return [(prompt, prompt.ids(self.tokenizer)) for prompt in found]

    def answer(self, folder: Path, asked: Asked) -> None:
        """Answer what has no answer yet."""
        rows = _shared(folder, "done")
        known = rows.read()
        distributed.wait()  # before anything is written, so that all ranks see the same work
        todo = [(prompt, ids) for prompt, ids in asked if prompt.key not in known]
        size, total = self.options.batch_size, len(asked)
        left = [prompt for prompt, _ in todo]
        if self.config.endpoint is not None:
            self.served = self._ask(self.config, rows, left, total, size)
        elif todo and self.config.backend == "vllm":
            self._ask_vllm(rows, left, total)
        elif todo:
            sampling = sampling_of(self.config, self.vocab_size)
            generator = BatchGenerator(self.loaded(), self.tokenizer, sampling)
            answer_locally(rows, generator, self.tokenizer, todo, total, size)
        distributed.wait()

    def _ask_vllm(self, rows: Rows, todo: list[Prompt], total: int) -> None:
        device, patience = self.options.torch_device(), self.config.request_timeout
        dtype = self.checkpoint.compute_dtype(device)
        with vllm_server.serve(self.checkpoint.folder, dtype, device) as server:
            self.engine = f"vLLM {server.version}"
            patience = max(patience, vllm_server.REQUEST_TIMEOUT)
            own = {"endpoint": server.url, "request_timeout": patience}
            config = self.config.model_copy(update=own)
            self._ask(config, rows, todo, total, vllm_server.AT_ONCE)

    def _ask(
        self, config: GenerateConfig, rows: Rows, todo: list[Prompt], total: int, at_once: int
    ) -> str:
        """Ask a server for answers; return its name of its model."""
        endpoint = Endpoint(config)
        try:
            answer_remotely(rows, endpoint, self.tokenizer, todo, total, at_once)
        finally:
            endpoint.close()
        return endpoint.model

    def judge(self, folder: Path, asked: Asked) -> dict[str, float]:
        """The perplexity of each answer by its prompt's key; empty if no limit is set."""
        if self.config.max_perplexity is None:
            return {}
        rows, answers = _shared(folder, "judged"), Rows(folder).read()
        known = rows.read()
        distributed.wait()
        usable = [
            prompt.answered(answers[prompt.key]["answer"])
            for prompt, _ in asked
            if fault(answers[prompt.key], self.config, None) is None
        ]
        todo = [row for row in usable if row["id"] not in known]
        if todo:
            judge(rows, self.loaded(), self.tokenizer, todo, len(usable))
        distributed.wait()
        return {key: row["perplexity"] for key, row in rows.read().items()}

    def answered_by(self, named: str, licence: Licence) -> dict[str, Any]:
        """What the manifest says of the model that answered."""
        if self.config.endpoint is None:
            engine = {"engine": self.engine} if self.config.backend == "vllm" else {}
            return {"model": named, **engine, "licence": str(licence)}
        served = {"endpoint": self.config.endpoint, "model": self.served}
        return {**served, "licence": str(licence)}


def _shared(folder: Path, name: str) -> Rows:
    """The rows of a name, in one file."""
    rows = Rows(folder, name)
    if distributed.is_main():
        rows.tidy()
    distributed.wait()
    return rows


def sampling_of(config: GenerateConfig, vocab_size: int) -> Sampling:
    """How the tokens are chosen, of the ids below `vocab_size`."""
    return Sampling(
        config.max_new_tokens,
        config.temperature,
        config.top_p,
        config.seed,
        config.greedy,
        vocab_size,
        top_logprobs=config.top_logprobs,
    )
