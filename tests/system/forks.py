"""What test_faults.py starts: a process that has imported everything, and forks a run a line.

A line is JSON: script, argv, log (a file), and what is to happen to it: `after` seconds, or `at`
the n-th call of a function ([module, function, n]), `what`: kill (SIGKILL), term (SIGTERM), int
(Ctrl-C), twice (Ctrl-C two times) or full (no file may grow any more, as on a full disk). A
function is replaced in the module where it is looked up. The answer is a line too: the exit status
(negative: the signal that ended it) and the seconds it took.
"""

import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch

import train_value
import train_vapo
from system import run

SCRIPTS = {"train_vapo": train_vapo, "train_value": train_value}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}


def strike(what):
    if what == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    elif what == "twice":  # Ctrl-C, and again some seconds later
        os.kill(os.getpid(), signal.SIGINT)
        run.STOP[1] -= 10
        os.kill(os.getpid(), signal.SIGINT)
    else:
        os.kill(os.getpid(), SIGNALS[what])


def strike_at(module, name, number, what):
    """Has the n-th call of a function begin with the fault."""
    owner, calls = importlib.import_module(module), []
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    whole = getattr(owner, name)

    def struck(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            strike(what)
        return whole(*args, **kwargs)

    setattr(owner, name, struck)


def child(task):
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    if task.get("at"):
        strike_at(*task["at"], task["what"])
    code = 1
    try:
        SCRIPTS[task["script"]].main(task["argv"])
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        print(repr(error))
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


gc.freeze()  # what is imported stays: the runs' own gc.collect need not look at it
print("ready", flush=True)
for line in sys.stdin:
    task, started = json.loads(line), time.time()
    pid = os.fork()
    if pid == 0:
        child(task)
    status = None
    while status is None:
        ended, status_now = os.waitpid(pid, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(status_now)
        elif task.get("after") is not None and time.time() - started > task["after"]:
            os.kill(pid, SIGNALS[task["what"]])
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        else:
            time.sleep(0.005)
    print(json.dumps({"status": status, "seconds": time.time() - started}), flush=True)
