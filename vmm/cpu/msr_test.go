package cpu

import (
	"slices"
	"testing"
)

func TestMSROrder(t *testing.T) {
	list := []uint32{msrTSCDeadline, 0x174, msrKVMAsyncPF, 0x4b564d06, 0xc0000081}
	slices.SortStableFunc(list, func(a, b uint32) int { return turn(a) - turn(b) })
	if want := []uint32{0x174, 0x4b564d06, 0xc0000081, msrKVMAsyncPF, msrTSCDeadline}; !slices.Equal(list, want) {
		t.Errorf("order %#x, want %#x", list, want)
	}
}
