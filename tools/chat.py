"""A conversation in the terminal: `python eval.py --model=PATH --tasks=chat`."""
import codecs
import math
from pathlib import Path

import torch

import sft
from configurator import UserError
from eval import Config, PromptEncoder, open_model
from model import Decoder, Motif
from support.ranks import WORLD

CHAT_TEMPERATURE = 0.7          # unless --temperature is given
CHAT_TOP_K = 50
MAX_REPLY_TOKENS = 1024


def start_chat(folder: Path, c: Config, device: torch.device) -> None:
    """Answer --prompt with the model in this folder or, without one, converse."""
    if WORLD > 1:
        raise UserError("a chat needs one process; start it without torchrun")
    model, encoder = open_model(folder, c, device)
    model.compile_steps = c.compile and device.type == "cuda"
    if c.prompt is None:
        chat(model, encoder, c)
    else:
        question = [{"role": "user", "content": c.prompt}]
        print_reply(question, model, encoder, c.temperature or 0.0, c.seed)


def chat(model: Motif, encoder: PromptEncoder, c: Config) -> None:
    """Read lines from the terminal and answer them, until /quit or the end of the input. Each
    reply has a seed of its own, so that the same question may get another answer."""
    print("/reset forgets, /system TEXT instructs, /temp X, /quit; Ctrl-C stops a reply")
    system = []
    messages = []
    temperature = CHAT_TEMPERATURE if c.temperature is None else c.temperature
    turn = 0
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        elif command == "/reset":
            messages = []
        elif command == "/system":
            system = [{"role": "system", "content": rest}] if rest else []
            messages = []
        elif command == "/temp":
            temperature = parse_temperature(rest, temperature)
        elif command.startswith("/"):
            print(f"{command} is unknown; there are /reset, /system, /temp and /quit")
        elif line:
            messages.append({"role": "user", "content": line})
            reply = print_reply(system + messages, model, encoder, temperature, c.seed + turn)
            messages.append({"role": "assistant", "content": reply})
        turn += 1


def parse_temperature(text: str, current: float) -> float:
    """The temperature that /temp asks for; the current one, with a message, if the text is not a
    number. A negative one counts as 0."""
    try:
        temperature = float(text)
    except ValueError:
        temperature = math.nan
    if math.isfinite(temperature):
        return max(0.0, temperature)
    print(f"/temp needs a number, as in /temp 0.7, not {text!r}")
    return current


def print_reply(messages: list[dict], model: Motif, encoder: PromptEncoder, temperature: float,
                seed: int) -> str:
    """Print a reply while it is generated, and return it. Ctrl-C ends it."""
    max_length = model.config.max_position_embeddings
    max_new_tokens = min(MAX_REPLY_TOKENS, max_length // 2)
    prompt = fit_conversation(messages, encoder, max_length - max_new_tokens)
    prompt = torch.tensor([prompt], device=model.head_weight.device)

    reply = ""
    # A letter may be several tokens: utf8 holds its first bytes back until the last one is there.
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    try:
        decoder = Decoder(model, prompt, max_new_tokens, temperature, CHAT_TOP_K, seed)
        for _ in range(max_new_tokens):
            token = decoder.next_tokens().item()
            if token in encoder.end_ids:
                break
            piece = utf8.decode(encoder.tokenizer.token_bytes(token))
            print(piece, end="", flush=True)
            reply += piece
    except KeyboardInterrupt:
        pass
    print(flush=True)
    return reply


def fit_conversation(messages: list[dict], encoder: PromptEncoder, max_tokens: int) -> list[int]:
    """The ids of a conversation, at most max_tokens. If it is longer, the oldest exchanges are left
    out, but not the system message. If the last question alone is too long, the beginning of all is
    cut off."""
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    system = messages[:questions[0]]
    ids = []
    for start in questions:
        ids = sft.encode_prompt(encoder.tokenizer, system + messages[start:])
        if len(ids) <= max_tokens:
            break
    return ids[-max_tokens:]
