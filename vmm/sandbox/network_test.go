package sandbox

import (
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestNetworkRules: what a network's process has no business with is not allowed.
func TestNetworkRules(t *testing.T) {
	raw, err := assemble(Policy{Network: true}.rules(), unix.SECCOMP_RET_TRAP)
	if err != nil {
		t.Fatal(err)
	}
	program, _ := bpf.Disassemble(raw)
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	const allow, trap = uint32(unix.SECCOMP_RET_ALLOW), uint32(unix.SECCOMP_RET_TRAP)
	for _, c := range []struct {
		call uint32
		args [3]uint32
		want uint32
	}{
		{unix.SYS_SOCKET, [3]uint32{unix.AF_INET, unix.SOCK_STREAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK, 0}, allow},
		{unix.SYS_SOCKET, [3]uint32{unix.AF_INET6, unix.SOCK_DGRAM | unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK, 0}, allow},
		{unix.SYS_SOCKET, [3]uint32{unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP}, trap},
		{unix.SYS_SOCKET, [3]uint32{unix.AF_INET, unix.SOCK_STREAM, 262}, trap}, // MPTCP
		{unix.SYS_SOCKET, [3]uint32{unix.AF_UNIX, unix.SOCK_STREAM, 0}, trap},
		{unix.SYS_SOCKET, [3]uint32{unix.AF_NETLINK, unix.SOCK_RAW, 0}, trap},
		{unix.SYS_SOCKET, [3]uint32{unix.AF_PACKET, unix.SOCK_RAW, 0}, trap},
		{unix.SYS_SOCKET, [3]uint32{unix.AF_VSOCK, unix.SOCK_STREAM, 0}, trap},
		{unix.SYS_OPENAT, [3]uint32{}, uint32(unix.SECCOMP_RET_ERRNO) | uint32(unix.EACCES)},
		{unix.SYS_EXECVE, [3]uint32{}, trap},
		{unix.SYS_PTRACE, [3]uint32{}, trap},
		{unix.SYS_IOCTL, [3]uint32{}, trap},
		{unix.SYS_CLONE, [3]uint32{goThread}, allow},
		{unix.SYS_CLONE, [3]uint32{uint32(unix.SIGCHLD)}, trap},
		{unix.SYS_KILL, [3]uint32{1}, trap},
		{unix.SYS_MEMFD_CREATE, [3]uint32{}, trap},
	} {
		data := make([]byte, 64)
		put := func(at int, v uint32) {
			// The filter's machine loads big endian.
			data[at], data[at+1], data[at+2], data[at+3] = byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
		}
		put(0, c.call)
		put(4, unix.AUDIT_ARCH_X86_64)
		for i, a := range c.args {
			put(16+8*i, a)
		}
		got, err := vm.Run(data)
		if err != nil {
			t.Fatal(err)
		}
		if uint32(got) != c.want {
			t.Errorf("call %d %v: %#x, expected %#x", c.call, c.args, got, c.want)
		}
	}
}
