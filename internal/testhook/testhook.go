// Package testhook has what only tests switch on. No part of it is reachable from
// outside of this module.
package testhook

import "sync/atomic"

// Prefill has machines that boot write a pattern other than zero to all RAM from
// 1 MiB up before the kernel is loaded, so that memory which the guest never uses
// is neither a hole nor zero, and does not become a hole when the guest reports it
// as free. It does not apply to a machine that is reset or received.
var Prefill atomic.Bool

// WithoutDirtyLog takes flags (kvm.DirtyLogManualProtect and so on) away from what
// machines use of manual protection, as if the kernel were older.
var WithoutDirtyLog atomic.Int64

// RingBytes is the size of a vCPU's dirty ring in new machines, in bytes; 0: the
// usual one. A small ring is full often.
var RingBytes atomic.Int64

// SlowFlush is how long each flush of a disk takes besides, in nanoseconds: a storage
// that is slow.
var SlowFlush atomic.Int64
