package sandbox

import (
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/vmm/memory"
	"golang.org/x/sys/unix"
)

// Constants that x/sys lacks, or has with another type.
const (
	fOFDGetLock  = 36
	fOFDSetLock  = 37
	fOFDSetLockW = 38

	prSetVMA = 0x53564d41 // Go's runtime names its mappings

	// Linux 6.7's PAGEMAP_SCAN.
	pagemapScan = 0xc0606610

	archSetFS             = 0x1002
	archGetXCompSupported = 0x1021
	archGetXCompGuestPerm = 0x1024
	archReqXCompGuestPerm = 0x1025

	// What a thread is cloned with, by Go and by glibc.
	thread      = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_SYSVSEM | unix.CLONE_THREAD
	goThread    = thread | unix.CLONE_SETTLS
	glibcThread = goThread | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID
)

func one(arg uint32, values ...uint32) []alternative {
	return []alternative{{{arg: arg, values: values}}}
}

func none(arg, bits uint32) []alternative { return []alternative{{{arg: arg, none: bits}}} }

// hot are the calls of a guest that runs and of a migration, first in the filter.
func (p Policy) hot() []rule {
	requests := ioctls()
	if p.Mode == Log {
		requests = append(requests, notifyReceive, notifySend)
	}
	if p.Missing {
		requests = append(requests, memory.FaultRequests()...)
	}
	return append([]rule{{call: "ioctl", any: one(1, requests...)}},
		always("futex", "read", "write", "epoll_pwait", "nanosleep", "rt_sigreturn", "readv", "writev", "recvmsg", "preadv", "pwritev", "preadv2", "pwritev2",
			"pread64", "pwrite64", "ppoll", "poll", "sched_yield", "clock_gettime", "getpid", "gettid", "rt_sigprocmask", "rt_sigtimedwait", "madvise")...)
}

// rules are the system calls of the process.
func (p Policy) rules() []rule {
	if p.Network {
		return networkRules()
	}
	self := uint32(unix.Getpid())
	list := append(p.hot(), runtimeRules(self)...)
	list = append(list, always(
		// Files and other descriptors; what may be opened is Landlock's to say.
		"close", "dup", "dup3", "lseek", "fstat", "newfstatat", "statx", "fstatfs", "statfs", "openat", "readlinkat", "getdents64", "getcwd", "faccessat", "faccessat2",
		"unlinkat", "renameat", "renameat2", "linkat", "fgetxattr", "lgetxattr", "fsetxattr", "fremovexattr", "fchmod", "fchmodat", "flock", "ftruncate", "fallocate", "fsync", "fdatasync", "fadvise64",
		"pipe2", "eventfd2", "memfd_create", "epoll_create1", "epoll_ctl", "copy_file_range", "splice", "sendfile",
		// Sockets that are there.
		"accept4", "getsockname", "getpeername", "getsockopt", "setsockopt", "recvfrom", "shutdown", "connect",
		// Questions, and the end of a process that was started before.
		"uname", "getrusage", "getuid", "geteuid", "getgid", "getegid", "getpgrp", "getpgid", "waitid", "wait4", "mincore", "sysinfo",
	)...)
	list = append(list,
		rule{call: "fcntl", any: one(1, unix.F_DUPFD, unix.F_GETFD, unix.F_SETFD, unix.F_GETFL, unix.F_SETFL, unix.F_DUPFD_CLOEXEC,
			fOFDGetLock, fOFDSetLock, fOFDSetLockW, unix.F_SETPIPE_SZ, unix.F_ADD_SEALS, unix.F_GET_SEALS)},
		rule{call: "socket", any: p.sockets()},
		rule{call: "socketpair", any: one(0, unix.AF_UNIX)}, // for a process that takes the guest over
		// A connection that a send makes passes by Landlock.
		rule{call: "sendto", any: none(3, unix.MSG_FASTOPEN)},
		rule{call: "sendmsg", any: none(2, unix.MSG_FASTOPEN)},
		// A filter that is added, on this thread only, can only take more away.
		rule{call: "seccomp", any: []alternative{{{arg: 0, values: []uint32{unix.SECCOMP_SET_MODE_FILTER}}, {arg: 1, values: []uint32{0}}}}},
	)
	if p.Kill { // pidfd_open is not allowed, and no file of /proc is
		list = append(list, rule{call: "pidfd_send_signal", any: one(1, uint32(unix.SIGKILL))})
	}
	if p.Listen || p.Netlink { // to be told of changes
		list = append(list, always("bind")...)
	}
	if p.Listen {
		list = append(list, always("listen")...)
	}
	return list
}

// sockets are families with their protocols. Landlock's rules for TCP leave out
// protocols that are built upon it, such as MPTCP.
func (p Policy) sockets() []alternative {
	list := []alternative{
		{{arg: 0, values: []uint32{unix.AF_UNIX}}, {arg: 2, values: []uint32{0}}},
		{{arg: 0, values: []uint32{unix.AF_INET, unix.AF_INET6}}, {arg: 2, values: []uint32{0, unix.IPPROTO_TCP, unix.IPPROTO_UDP}}},
	}
	if p.Netlink {
		list = append(list, alternative{{arg: 0, values: []uint32{unix.AF_NETLINK}}, {arg: 2, values: []uint32{unix.NETLINK_ROUTE}}})
	}
	return list
}

// runtimeRules are what Go's runtime, and a C library in its process, do on any thread at
// any time.
func runtimeRules(self uint32) []rule {
	return append(always(
		"munmap", "mremap", "clock_nanosleep", "restart_syscall", "sigaltstack", "exit", "exit_group", "sched_getaffinity", "getrandom",
		"brk", "set_robust_list", "rseq", "gettimeofday", "time", "membarrier"),
		rule{call: "mmap", any: none(2, unix.PROT_EXEC)},
		rule{call: "mprotect", any: none(2, unix.PROT_EXEC)},
		rule{call: "clone", any: one(0, thread, goThread, glibcThread)},
		rule{call: "clone3", errno: unix.ENOSYS}, // its flags are in memory: glibc then uses clone
		rule{call: "tgkill", any: one(0, self)},
		rule{call: "kill", any: one(0, self)},
		rule{call: "arch_prctl", any: one(0, archSetFS, archGetXCompSupported, archGetXCompGuestPerm, archReqXCompGuestPerm)},
		rule{call: "prctl", any: one(0, prSetVMA, unix.PR_SET_NAME)},
		rule{call: "prlimit64", any: []alternative{{{arg: 0, values: []uint32{0}}, {arg: 2, values: []uint32{0}}}}}, // to ask
		// Capabilities that were kept are dropped later, on each thread.
		rule{call: "capset"}, rule{call: "capget"},
		// The handler of SIGSYS stays.
		rule{call: "rt_sigaction", any: []alternative{{{arg: 0, values: signals()}}}},
	)
}

// signals are all but SIGSYS.
func signals() (list []uint32) {
	for s := uint32(1); s <= 64; s++ {
		if s != uint32(unix.SIGSYS) {
			list = append(list, s)
		}
	}
	return list
}

// vcpuRules are the system calls of a thread that runs a vCPU: KVM's, the runtime's except
// for new threads, and what a device does when the guest writes its registers: to activate
// one takes an eventfd, to reset one closes connections.
func vcpuRules() []rule {
	p := Policy{}
	list := p.hot()
	for _, r := range runtimeRules(uint32(unix.Getpid())) {
		if r.call != "clone" && r.call != "clone3" {
			list = append(list, r)
		}
	}
	return append(list, always("close", "shutdown", "setsockopt", "eventfd2", "epoll_ctl", "fallocate")...)
}

func always(calls ...string) (list []rule) {
	for _, c := range calls {
		list = append(list, rule{call: c})
	}
	return list
}

// ioctls are all that the VMM makes, KVM_RUN first.
func ioctls() []uint32 {
	return append(kvm.Requests(),
		pagemapScan, unix.SIOCOUTQ,
		unix.TCGETS, unix.TCSETS, unix.TIOCGPGRP, unix.TIOCGWINSZ,
		unix.BLKDISCARD, unix.BLKSSZGET, unix.BLKPBSZGET, unix.BLKIOMIN, unix.BLKIOOPT, unix.BLKZEROOUT,
		unix.TUNSETIFF, unix.TUNGETIFF, unix.TUNGETFEATURES, unix.TUNSETOFFLOAD, unix.TUNSETQUEUE, unix.TUNSETCARRIER, unix.TUNGETVNETHDRSZ,
		unix.TUNSETVNETHDRSZ, unix.TUNSETOWNER, unix.TUNSETPERSIST)
}
