"""A system call filter for sandboxed programs, in the kernel's format (classic BPF).

It refuses the calls that make processes and threads, sockets, memory that no limit counts, or
namespaces, and those that reach into other processes or the kernel. So a program is one process
whose memory its address space bounds, also when it is started by root, for whom the kernel enforces
no limit on the number of processes.
"""

import errno
import platform
import struct

from experiments import files

_X86_64 = {
    "socket": 41, "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58, "shmget": 29,
    "semget": 64, "msgget": 68, "ptrace": 101, "pivot_root": 155, "mount": 165, "mq_open": 240,
    "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272, "perf_event_open": 298,
    "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "memfd_create": 319,
    "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "clone3": 435, "memfd_secret": 447,
}  # fmt: skip
_AARCH64 = {
    "mount": 40, "pivot_root": 41, "unshare": 97, "ptrace": 117, "mq_open": 180, "msgget": 186,
    "semget": 190, "shmget": 194, "socket": 198, "socketpair": 199, "add_key": 217,
    "request_key": 218, "keyctl": 219, "clone": 220, "perf_event_open": 241, "setns": 268,
    "process_vm_readv": 270, "process_vm_writev": 271, "memfd_create": 279, "bpf": 280,
    "userfaultfd": 282, "io_uring_setup": 425, "clone3": 435, "memfd_secret": 447,
}  # fmt: skip
_MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}
_FIRST_X32_CALL = 0x40000000

_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE = 0, 4  # where in struct seccomp_data
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


def program() -> bytes:
    """The filter for this machine, as struct sock_filter[].

    Raises:
        files.Failure: the machine's system calls are not known here.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise files.Failure(
            f"Generated code can be run on {' and '.join(_MACHINES)} alone, not on {machine}"
        )
    architecture, calls = _MACHINES[machine]
    refused = sorted(calls.values())
    return b"".join(
        [
            _instruction(_LOAD, _ARCHITECTURE),
            _instruction(_IF_EQUAL, architecture, if_true=1),
            _instruction(_RETURN, _KILL),
            _instruction(_LOAD, _NUMBER),
            _instruction(_IF_AT_LEAST, _FIRST_X32_CALL, if_true=len(refused) + 1),
            *(
                _instruction(_IF_EQUAL, call, if_true=len(refused) - i)
                for i, call in enumerate(refused)
            ),
            _instruction(_RETURN, _ALLOW),
            _instruction(_RETURN, _REFUSE),
        ]
    )


def _instruction(code: int, operand: int, if_true: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, 0, operand)
