"""The process behind `Forks`: reads requests as lines of JSON, and responds with exit statuses."""

import ctypes
import json
import os
import sys
import traceback
from typing import Any


def execute(request: dict[str, Any], names: dict[str, Any]) -> None:
    """Run the code of a request in this process, which ends with it."""
    for number, name in {1: "out", 2: "err"}.items():
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_APPEND), number)
    status = 0
    try:
        ctypes.CDLL(None).faults_arm(
            os.fsencode(request["folder"]),
            os.fsencode(request["trace"]),
            *(
                ctypes.c_long(request[name])
                for name in ("kill_at", "full_at", "full_until", "torn", "error")
            ),
        )
        exec(request["code"], names)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    names: dict[str, Any] = {}
    responses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        status = 0
        if "setup" in request:
            exec(request["setup"], names)
        else:
            child = os.fork()
            if not child:
                execute(request, names)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, file=responses, flush=True)


main()
