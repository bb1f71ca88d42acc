"""Talk to a run's model: the adapter on its base, or the full model; answers stream."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..planner.plan import Plan
from ..recipes.errors import FituneError, RunError
from ..recipes.schema import ModelTable
from .data.encoding import Encoder
from .data.rows import Message
from .data.tokens import find_stop_token_ids
from .model.build import load_base
from .model.models import fetch_model, find_model_source
from .quiet import quiet_libraries
from .report import load_report
from .training.step import autocast

ANSWER_TOKENS = 512
"""Longest answer, in tokens."""


class ChatModel:
    """A run's model and tokenizer, with the conversation so far."""

    def __init__(self, run: Path, *, use_base: bool) -> None:
        from transformers import AutoTokenizer

        plan, report = load_report(run)
        self.plan, self.use_base = plan, use_base
        self._failure: Exception | None = None
        name = next(iter(report.output))
        folder = run / report.output[name]
        if not folder.is_dir():
            raise RunError(f"{run}: its {name} is gone")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with quiet_libraries():
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
            self.model = self._load(plan, name, folder)
        self.model.eval()
        self.messages: list[Message] = []
        system = plan.resolved_recipe["data"].get("system")
        if system:
            self.messages.append(Message(role="system", content=system))

    def _load(self, plan: Plan, name: str, folder: Path) -> Any:
        """The full model, or the base with its adapter on top; the base alone where that is asked for."""
        trust = bool(plan.resolved_recipe["model"].get("trust_remote_code"))
        if name == "model" and not self.use_base:
            return load_base(folder, plan.strategy, self.device, trust_remote_code=trust)
        base_folder = self._find_base(plan)
        base = load_base(base_folder, plan.strategy, self.device, trust_remote_code=trust)
        if self.use_base:
            return base
        from peft import PeftModel

        return PeftModel.from_pretrained(base, str(folder))

    def _find_base(self, plan: Plan) -> Path:
        """The base model's folder; a path in the recipe is relative to the recipe's folder, as it was for the run."""
        folder = Path(plan.recipe).parent
        try:
            table = ModelTable.model_validate(plan.resolved_recipe["model"])
            source = find_model_source(table, lambda written: folder / Path(written).expanduser())
            base_folder = fetch_model(source)
        except (FituneError, ValueError) as error:
            raise RunError(f"the base model of this run cannot be found any more: {error}") from error
        if source.config_sha256 != plan.model.config_sha256:
            raise RunError(f"the base model of this run is no longer what {plan.recipe} names: {source.id} is another")
        return base_folder

    def stream(self, question: str, write: Any) -> str:
        """Answer `question`, calling `write` with each piece of text as it comes; returns the whole answer."""
        from transformers import TextIteratorStreamer

        self.messages.append(Message(role="user", content=question))
        ids = torch.tensor([Encoder(self.tokenizer).encode_prompt(self.messages)], device=self.device)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        thread = Thread(target=self._generate, args=(ids, streamer), daemon=True)
        thread.start()
        pieces = []
        for piece in streamer:
            pieces.append(piece)
            write(piece)
        thread.join()
        if self._failure is not None:
            raise self._failure
        answer = "".join(pieces)
        self.messages.append(Message(role="assistant", content=answer))
        return answer

    def _generate(self, ids: torch.Tensor, streamer: Any) -> None:
        """Runs in a thread of its own: an error is kept for the thread that reads the stream."""
        try:
            stops = find_stop_token_ids(self.tokenizer)
            with quiet_libraries(), torch.no_grad(), autocast(self.plan.strategy, self.device):
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=ANSWER_TOKENS,
                    do_sample=False,
                    repetition_penalty=1.1,
                    eos_token_id=list(stops),
                    pad_token_id=stops[0],
                    streamer=streamer,
                )
        except Exception as error:
            self._failure = error
            streamer.end()


def run_chat(run: Path, console: Console, *, use_base: bool, question: str | None) -> None:
    """Answer one question, or questions from the terminal until it ends."""
    chat = ChatModel(run, use_base=use_base)
    if question is not None:
        _answer(chat, question, console)
        return
    who = "the base model" if use_base else "the tuned model"
    console.print(Text(f"Talk to {who}; an empty line or Ctrl-D ends it.", style="bright_black"))
    while True:
        try:
            asked = console.input("[bold]you > [/bold]").strip()
        except EOFError:
            asked = ""
        if not asked:
            return
        _answer(chat, asked, console)


def _answer(chat: ChatModel, question: str, console: Console) -> None:
    chat.stream(question, lambda piece: console.print(piece, end="", markup=False, highlight=False, soft_wrap=True))
    console.print()
