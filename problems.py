"""What is asked: problems (of the files in system/files.py), put into the prompt, as token ids."""

from system.equality import normalise, rational
from system.files import load_problems
from system.run import require


def prompted_problems(path, tokenizer, settings):
    """`load_problems` and `encode_prompts` as the settings of a run say."""
    s = settings
    how = (s.prompt_template, s.prompt_length, s.chat_template, s.drop_long_prompts)
    problems = load_problems(path, answers=not s.reward)
    latex = [a for p in problems if "\\" in (a := p["answer"]) and rational(normalise(a)) is None]
    if latex and s.verifier == "exact":
        said = f"{path}: {len(latex)} answers are LaTeX such as {latex[0][:40]}, which is compared"
        print(f"warning: {said} as it is spelt: --verifier math_verify knows what it means")
    return encode_prompts(problems, tokenizer, *how)


def encode_prompts(problems, tokenizer, template, longest, chat_template=True, drop_long=False):
    """Adds "prompt" (token ids) to each problem; returns those of at most `longest` tokens.
    The prompt is the template filled in, or the problem's own chat messages. Where `chat_template`
    and the tokenizer has one, the user says it in the model's chat format, up to where the
    assistant answers. Raises: BadInput if all are longer, or some are and not `drop_long`."""
    for problem in problems:
        text, messages, flags = problem["problem"], problem.get("messages"), {}
        text = text if messages else template.replace("{problem}", text)
        if chat_template and tokenizer.chat_template:
            messages = messages or [{"role": "user", "content": text}]
            how = {"tokenize": False, "add_generation_prompt": True}
            text = tokenizer.apply_chat_template(messages, **how)
            flags = {"add_special_tokens": False}  # the format writes its own BOS
        problem["prompt"] = tokenizer(text, **flags)["input_ids"]
    good = [problem for problem in problems if 0 < len(problem["prompt"]) <= longest]
    bad = [problem for problem in problems if not 0 < len(problem["prompt"]) <= longest]
    if bad:
        said = f"{len(bad)} of {len(problems)} prompts are longer than --prompt_length {longest}"
        said += f" (or empty), the first, of {len(bad[0]['prompt'])} tokens: {bad[0]['where']}"
        require(good and drop_long, f"{said}; raise it, or --drop_long_prompts if some are good")
        print(f"warning: {said}: dropped")
    return good


def repeated(problems, others):
    """How many of `problems` stand, but for spaces, also among `others`."""
    known = {" ".join(other["problem"].split()) for other in others}
    return sum(" ".join(problem["problem"].split()) in known for problem in problems)
