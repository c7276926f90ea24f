"""Are these two answers the same, in general LaTeX (roots, π, intervals, sets)?

    pip install math-verify      # optional: only for --verifier math_verify

What equality.equal accepts is right; two numbers are compared by it alone, and a sum or product of
numbers is not worked out ("25 + 49" does not answer "What is 25 + 49?"). All else is Math-Verify's.
It simplifies with sympy what a model wrote, which can take any time and memory: a child process
does it, and a verdict that takes too much of either is "wrong", and costs that child its life.
"""

import json
import re
import select
import subprocess
import sys
from contextlib import suppress

if __name__ != "__main__":  # the child has no use for them
    from system.equality import equal, normalise, rational
    from system.run import require

ARITHMETIC = re.compile(r"(?:[\d\s.,+*/()^×·÷{}!-]|\\(?:cdot|times|div|[dt]?frac|left|right))*")


class MathEquality:
    """equal(stated, reference) as equality.equal, and Math-Verify's beyond it, in a child of at
    most `megabytes` (not on macOS) and `seconds` a verdict. Raises: BadInput if it cannot start."""

    def __init__(self, seconds=5.0, megabytes=2048):
        self.seconds, self.megabytes, self.child = seconds, megabytes, None

    def __call__(self, stated, reference):
        if equal(stated, reference):
            return True
        normal, number = normalise(stated), rational(normalise(reference))
        both_numbers = rational(normal) is not None or ARITHMETIC.fullmatch(normal)
        if number is not None and both_numbers:
            return False
        if self.child is None:
            self.start()
        return self.answer(stated, reference, self.seconds) or False

    def start(self):
        command = [sys.executable, __file__, str(self.megabytes)]
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        how |= {"text": True, "start_new_session": True}  # Ctrl-C is not for it
        self.child = subprocess.Popen(command, **how)
        works = self.answer("2\\sqrt{2}", "\\sqrt{8}", seconds=120)  # it imports sympy first
        require(works, f"Math-Verify does not work in {self.megabytes} MB: try to import it")

    def answer(self, stated, reference, seconds):
        """What the child answers to a question; None if nothing in time: then it is killed."""
        with suppress(BrokenPipeError):
            print(json.dumps([stated, reference]), file=self.child.stdin, flush=True)
            readable, _, _ = select.select([self.child.stdout], [], [], seconds)
            if readable and (line := self.child.stdout.readline()):
                return json.loads(line)
        self.close()  # the next question starts another

    def close(self):
        if self.child:
            self.child.kill()
            self.child.communicate()
            self.child = None

    __del__ = close


def serve(megabytes):
    """The child: reads [stated, reference] a line, writes a verdict a line."""
    import math_verify

    if sys.platform != "darwin":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes << 20, megabytes << 20))
    how = {"boxed_match_priority": 0, "try_extract_without_anchor": False}
    boxed = [math_verify.LatexExtractionConfig(**how)]

    def read(answer):
        return math_verify.parse(f"\\boxed{{{answer}}}", boxed, "no_fallback", parsing_timeout=None)

    for line in sys.stdin:
        try:
            stated, reference = map(read, json.loads(line))
            verdict = math_verify.verify(reference, stated, timeout_seconds=None)
        except Exception:  # whatever sympy finds wrong with what a model wrote; out of memory too
            verdict = False
        print(json.dumps(bool(verdict)), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
