"""Two gloo processes of one run, forked from this one, which has imported everything."""

import os
import socket
import traceback
from collections.abc import Callable

from accelerate import PartialState

from attention_guided_rl.errors import AgrlError


def together(work: Callable[[int], None]) -> list[int]:
    """Call `work(rank)` in each of two processes; return their exit codes: 0, that of an AgrlError, or 70."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            _be(work, rank, {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _be(work: Callable[[int], None], rank: int, environment: dict[str, str]) -> None:
    code = 70
    try:
        os.environ.update(environment)
        PartialState._reset_state()
        work(rank)
        PartialState().wait_for_everyone()  # the first process has the store that the other may still be reading
        code = 0
    except AgrlError as error:
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
