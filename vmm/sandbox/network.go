package sandbox

import "golang.org/x/sys/unix"

// networkRules are the system calls of the process of a network: sockets and the runtime's.
// It opens no file, whatever Landlock says; Go looks for some now and then, and is told
// that there are none.
func networkRules() []rule {
	self := uint32(unix.Getpid())
	list := append(always("futex", "read", "write", "epoll_pwait", "nanosleep", "rt_sigreturn", "readv", "writev", "recvmsg", "recvfrom", "sched_yield", "clock_gettime",
		"getpid", "gettid", "rt_sigprocmask", "madvise", "pread64", "poll"), runtimeRules(self)...)
	list = append(list, always("close", "fstat", "epoll_ctl", "epoll_create1", "eventfd2", "pipe2", "bind", "listen", "accept4", "connect", "getsockname", "getpeername", "getsockopt",
		"setsockopt", "shutdown", "getuid", "geteuid", "getgid", "getegid", "uname")...)
	internet := []uint32{unix.AF_INET, unix.AF_INET6}
	kinds := func(kind uint32) []uint32 { // Go's are of this kind
		return []uint32{kind, kind | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK, kind | unix.SOCK_CLOEXEC}
	}
	return append(list,
		rule{call: "socket", any: []alternative{
			{{arg: 0, values: internet}, {arg: 1, values: kinds(unix.SOCK_STREAM)}, {arg: 2, values: []uint32{0, unix.IPPROTO_TCP}}},
			{{arg: 0, values: internet}, {arg: 1, values: kinds(unix.SOCK_DGRAM)}, {arg: 2, values: []uint32{0, unix.IPPROTO_UDP}}},
		}},
		rule{call: "sendto", any: none(3, unix.MSG_FASTOPEN)},
		rule{call: "sendmsg", any: none(2, unix.MSG_FASTOPEN)},
		rule{call: "fcntl", any: one(1, unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL, unix.F_DUPFD_CLOEXEC)},
		rule{call: "openat", errno: unix.EACCES},
	)
}
