# Copyright 2026 The ChatGLM Transformers authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What runs inside of the sandbox of `agent_sandbox.py`, before the code of the model takes its place.

It is given to a fresh interpreter as text, stands alone, and knows nothing of this repository: it locks itself in and
becomes `python main.py`. Landlock (Linux 5.13) and seccomp have no module in Python, so their system calls are made by
number. Those of Landlock are the same on every processor; the ones that start a process are known for two kinds here.
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys


LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
PATH_BENEATH = 1
# From linux/landlock.h: execute, read a file, list a folder; the first thirteen bits are all of the first version.
READ, ALL = 0b1101, (1 << 13) - 1
# Later versions added: rename between folders, truncate, ioctl on devices.
ADDED = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}

# From linux/audit.h and the tables of system calls: the kind of processor, `clone`, `socketpair`, and what is refused:
# others that start a process, and `socket`, because a socket in the file system (of a desktop, of Docker) is reached
# whatever the namespace of the network is, and Landlock lets everybody connect to it.
PROCESSORS = {"x86_64": (0xC000003E, 56, 53, (57, 58, 41)), "aarch64": (0xC00000B7, 220, 199, (198,))}
# It makes sockets without the system call of that name.
IO_URING_SETUP = 425
CLONE3, CLONE_THREAD, FIRST_OTHER_TABLE = 435, 0x10000, 0x40000000
# Of the language of filters: load a word, jump if equal, if not smaller, if a bit is set, return.
LOAD, IF_EQUAL, IF_AT_LEAST, IF_SET, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
# Where a filter finds the number of the call, the kind of processor, the flags of `clone`, and the type of `socketpair`.
NUMBER, PROCESSOR, FLAGS, SOCKET_TYPE = 0, 4, 16, 24
# Bits of the types of sockets but `SOCK_STREAM`, whose pairs, which asyncio needs, can reach nobody else.
OTHER_TYPES = 0b1110


def limit(memory: int, seconds: int, file_size: int) -> None:
    """No more memory, processor time and bytes in a file than these; few open files, and no memory dumps."""
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def call(libc: ctypes.CDLL, *arguments: object) -> int:
    result = libc.syscall(*arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"Landlock: {os.strerror(ctypes.get_errno())}")
    return result


def lock(readable: list[str], writable: str) -> None:
    """Leave of all files only `readable` folders to read and the folder `writable` to write, for this process on.

    Raises:
        OSError: where the kernel has no Landlock, or it is switched off.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    version = call(libc, LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    handled = ALL | sum(bit for since, bit in ADDED.items() if version >= since)
    attribute = struct.pack("Q", handled)
    ruleset = call(libc, LANDLOCK_CREATE_RULESET, attribute, ctypes.c_size_t(len(attribute)), 0)
    for path, access in [*((path, READ) for path in readable), (writable, handled)]:
        if not os.path.exists(path):
            continue
        is_file = not os.path.isdir(path)
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        # A file takes no rights of folders: here, to list it.
        rule = struct.pack("=Qi", access & ~0b1000 if is_file else access, folder)
        call(libc, LANDLOCK_ADD_RULE, ruleset, PATH_BENEATH, rule, 0)
        os.close(folder)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")
    call(libc, LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def forbid_processes_and_sockets() -> None:
    """Let this process start threads and nothing else, and reach no socket.

    `setrlimit` counts the processes of everybody but root.

    Raises:
        OSError: for a processor whose system calls are not known here.
    """
    if platform.machine() not in PROCESSORS:
        raise OSError(errno.ENOSYS, f"system calls of the processor {platform.machine()} are not known")
    processor, clone, socketpair, refused = PROCESSORS[platform.machine()]
    refuse = (RETURN, 0, 0, REFUSE | errno.EPERM)
    steps = [
        (LOAD, 0, 0, PROCESSOR),
        *((IF_EQUAL, 1, 0, processor), refuse),
        (LOAD, 0, 0, NUMBER),
        *((IF_AT_LEAST, 0, 1, FIRST_OTHER_TABLE), refuse),
        *(step for number in (*refused, IO_URING_SETUP) for step in ((IF_EQUAL, 0, 1, number), refuse)),
        *((IF_EQUAL, 0, 4, socketpair), (LOAD, 0, 0, SOCKET_TYPE), (IF_SET, 0, 1, OTHER_TYPES), refuse),
        (RETURN, 0, 0, ALLOW),
        # Its flags are out of reach. The C library falls back to `clone` where it is not implemented.
        *((IF_EQUAL, 0, 1, CLONE3), (RETURN, 0, 0, REFUSE | errno.ENOSYS)),
        *((IF_EQUAL, 0, 3, clone), (LOAD, 0, 0, FLAGS), (IF_SET, 1, 0, CLONE_THREAD), refuse),
        (RETURN, 0, 0, ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"seccomp: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    memory, seconds, file_size = map(int, sys.argv[1:4])
    code = sys.stdin.buffer.read()
    with open("main.py", "wb") as file:
        file.write(code)
    folders = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/dev/null", "/dev/urandom", sys.base_prefix]
    lock(folders, os.getcwd())
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    limit(memory, seconds, file_size)
    forbid_processes_and_sockets()
    os.execv(sys.executable, [sys.executable, "-I", "main.py"])


if __name__ == "__main__":
    main()
