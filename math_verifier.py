"""Is this answer right, in general LaTeX (roots, π, intervals, sets)? Math-Verify says so, in a process that can be killed.

    pip install math-verify      # optional: only for --verifier math_verify

What is stated is found by verifier.extract_answer, so an answer stands in the same places under both verifiers. What
equality.equal accepts is right; two numbers are compared by it alone, and a sum or product of numbers is not worked out
(or "25 + 49" would be the answer to "What is 25 + 49?"). All else is Math-Verify's (github.com/huggingface/Math-Verify)
to decide. It simplifies with sympy what a model wrote, which can take any time and memory: so a child process does it,
and a verdict that takes too much of either is "wrong", and costs that child its life.
"""

import json
import re
import select
import subprocess
import sys

from equality import LONGEST, normalise, rational
from verifier import extract_answer, verify

ARITHMETIC = re.compile(r"(?:[\d\s.,+*/()^×·÷{}!-]|\\(?:cdot|times|div|[dt]?frac|left|right))*")


class MathVerifier:
    """verify(text, answer, bare_number) as verifier.verify, with Math-Verify's equality. Raises: BadInput if its process does not start.

    seconds: the longest that a verdict may take; megabytes: the most memory of the child (not limited on macOS).
    """

    def __init__(self, seconds=5.0, megabytes=2048):
        self.seconds, self.megabytes, self.child = seconds, megabytes, None

    def __call__(self, text, answer, bare_number=False):
        if verify(text, answer, bare_number):
            return True
        stated, reference = extract_answer(text, bare_number) if isinstance(text, str) else None, str(answer)
        if stated is None or len(reference) > LONGEST:
            return False
        normal, number = normalise(stated), rational(normalise(reference))
        if number is not None and (rational(normal) is not None or ARITHMETIC.fullmatch(normal)):
            return False
        return self.ask(stated, reference)

    def ask(self, stated, reference):
        """The child's verdict; False where it takes too long, or dies of it."""
        if self.child is None:
            command = [sys.executable, __file__, str(self.megabytes)]
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
            )  # Ctrl-C is not for it
            if self.answer_within(120) != "ready":  # it imports sympy first
                self.close()
                from run import BadInput  # here: the child reads this file too, and is not to have torch in its memory

                raise BadInput(
                    f"Math-Verify does not work in {self.megabytes} MB of memory, or not at all: try python -c 'import math_verify'"
                )
        try:
            self.child.stdin.write(json.dumps([stated, reference]).encode() + b"\n")
            self.child.stdin.flush()
            verdict = self.answer_within(self.seconds)
        except BrokenPipeError:
            verdict = None
        if verdict is None:
            self.close()  # the next question starts another
        return verdict is True

    def answer_within(self, seconds):
        """The next line that the child writes, as JSON, or None if none comes in time."""
        readable, _, _ = select.select([self.child.stdout], [], [], seconds)
        line = self.child.stdout.readline() if readable else b""
        return json.loads(line) if line else None

    def close(self):
        """Kills the child, if there is one."""
        if self.child:
            self.child.kill()
            self.child.wait()
            self.child.stdin.close()
            self.child.stdout.close()
            self.child = None

    __del__ = close


def serve(megabytes):
    """The child: reads [stated, reference] a line, writes a verdict a line."""
    import math_verify

    if sys.platform != "darwin":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    boxed = [math_verify.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def read(answer):
        return math_verify.parse(f"\\boxed{{{answer}}}", boxed, fallback_mode="no_fallback", parsing_timeout=None)

    works = math_verify.verify(read("\\sqrt{8}"), read("2\\sqrt{2}"), timeout_seconds=None)  # in this memory too
    print(json.dumps("ready" if works else "broken"), flush=True)
    for line in sys.stdin:
        try:
            stated, reference = map(read, json.loads(line))
            verdict = bool(stated and reference) and math_verify.verify(reference, stated, timeout_seconds=None)
        except Exception:  # whatever sympy finds wrong with what a model wrote, out of memory included
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
