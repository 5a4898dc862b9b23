package sandbox

import (
	"slices"
	"testing"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestFilterSaysWhatTheRulesSay runs the assembled program for every call, with arguments
// that the rules look at and others.
func TestFilterSaysWhatTheRulesSay(t *testing.T) {
	policy := Policy{Mode: On, Netlink: true}
	for what, rules := range map[string][]rule{"process": policy.rules(), "vCPU": vcpuRules(), "network": networkRules()} {
		raw, err := assemble(rules, 0)
		if err != nil {
			t.Fatal(err)
		}
		program, ok := bpf.Disassemble(raw)
		if !ok {
			t.Fatal("the program is not understood")
		}
		vm, err := bpf.NewVM(program)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d rules, %d instructions", what, len(rules), len(program))
		byNumber := make(map[uint32]rule)
		for _, r := range rules {
			n := numberOf(t, r.call)
			if _, twice := byNumber[n]; twice {
				t.Errorf("%s: two rules for %s", what, r.call)
			}
			byNumber[n] = r
		}
		values := []uint32{0, 1, 2, 16, ^uint32(0)}
		for _, r := range rules {
			for _, a := range r.any {
				for _, c := range a {
					values = append(values, c.none)
					for _, v := range c.values {
						values = append(values, v, v^1, v|1<<31)
					}
				}
			}
		}
		slices.Sort(values)
		values = slices.Compact(values)
		for n := range uint32(numbers) {
			r, known := byNumber[n]
			tested := []uint32{0, 1}
			if known && r.any != nil {
				tested = values
			}
			for _, x := range tested {
				for _, y := range []uint32{0, 1, 2, 6, 16, 17, x} {
					for _, high := range []uint32{0, 1} {
						args := [6]uint64{uint64(x) | uint64(high)<<32, uint64(y), uint64(x), uint64(x), 0, 0}
						if r.call == "socket" || r.call == "seccomp" {
							args[2] = uint64(y)
						} else {
							args[1] = uint64(x) | uint64(high)<<32
						}
						got, err := vm.Run(packed(n, args))
						if err != nil {
							t.Fatal(err)
						}
						want := 0 // what is refused
						if known && r.errno != 0 {
							want = int(seccomp.ActionErrno) | int(r.errno)
						} else if known && r.allows(args) {
							want = int(seccomp.ActionAllow)
						}
						if got != want {
							t.Fatalf("%s: call %d %s %#x: the filter says %#x, expected %#x", what, n, r.call, args, got, want)
						}
					}
				}
			}
		}
	}
}

// allows is what a rule means.
func (r rule) allows(args [6]uint64) bool {
	if r.any == nil {
		return true
	}
	return slices.ContainsFunc(r.any, func(a alternative) bool {
		return !slices.ContainsFunc(a, func(c check) bool {
			v := args[c.arg]
			return v>>32 != 0 || uint32(v)&c.none != 0 || c.values != nil && !slices.Contains(c.values, uint32(v))
		})
	})
}

// TestLongRules: conditional jumps skip at most 255 instructions.
func TestLongRules(t *testing.T) {
	var values []uint32
	for v := range uint32(1000) {
		values = append(values, v*3)
	}
	long := rule{call: "ioctl", any: []alternative{{{arg: 1, values: values}, {arg: 2, none: 1}}, {{arg: 2, values: values}}}}
	raw, err := assemble([]rule{long, {call: "read"}}, 0)
	if err != nil {
		t.Fatal(err)
	}
	program, ok := bpf.Disassemble(raw)
	if !ok {
		t.Fatal("the program is not understood")
	}
	vm, err := bpf.NewVM(program)
	if err != nil {
		t.Fatal(err)
	}
	for x := range uint64(3010) {
		for _, y := range []uint64{0, 1, 2, 3, 2997, 2998} {
			args := [6]uint64{1: x, 2: y}
			got, err := vm.Run(packed(numberOf(t, "ioctl"), args))
			if err != nil {
				t.Fatal(err)
			}
			if allowed := got == unix.SECCOMP_RET_ALLOW; allowed != long.allows(args) {
				t.Fatalf("ioctl with %#x: the filter says %#x", args, got)
			}
		}
	}
	if got, err := vm.Run(packed(numberOf(t, "read"), [6]uint64{})); err != nil || got != unix.SECCOMP_RET_ALLOW {
		t.Errorf("read: %#x, %v", got, err)
	}
}

// TestNames compares the table of system calls with that of another package.
func TestNames(t *testing.T) {
	for n, name := range names[:numbers] {
		if other := arch.X86_64.SyscallNumbers[n]; name != other {
			t.Errorf("system call %d is %q here and %q there", n, name, other)
		}
	}
	for n := range arch.X86_64.SyscallNumbers {
		if n >= numbers {
			t.Errorf("system call %d is not in the table", n)
		}
	}
}

func numberOf(t *testing.T, name string) uint32 {
	for n, s := range arch.X86_64.SyscallNumbers {
		if s == name {
			return uint32(n)
		}
	}
	t.Fatalf("no system call %s", name)
	return 0
}

// packed is struct seccomp_data as the machine of package bpf reads it: big-endian words.
func packed(n uint32, args [6]uint64) []byte {
	words := []uint32{n, 0xc000003e, 0, 0}
	for _, a := range args {
		words = append(words, uint32(a), uint32(a>>32))
	}
	b := make([]byte, 0, 64)
	for _, w := range words {
		b = append(b, byte(w>>24), byte(w>>16), byte(w>>8), byte(w))
	}
	return b
}
