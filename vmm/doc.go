// Package vmm is a virtual machine: memory, vCPUs, interrupt controllers, a
// serial port and the ports that switch it off, on KVM.
//
// There are two layers. A [Machine] is one life of the hardware: made from a
// [Spec], booted or loaded, run, paused, saved, ended. A [VM] is what a user
// calls a virtual machine: it has a name, goes on when its guest resets itself,
// and moves to another process or host while it runs.
//
//	vm, err := vmm.NewVM(vmm.Config{CPUs: 2, Memory: 512 << 20, Serial: backend})
//	...
//	outcome, err := vm.Run(ctx) // until the guest ends or has moved away
//
// and elsewhere, to move it:
//
//	vm, err := vmm.NewReceiver(vmm.ReceiveConfig{Listen: ":7777", Serial: backend})
//	...
//	outcome, err := vm.Run(ctx) // waits for a guest, then runs it
//
// and, in the first process, StartMigration("host:7777", migrate.Options{}).
//
// # vCPUs
//
// Each vCPU is a goroutine locked to its thread. All of them pass one gate
// before they enter the guest. Pausing closes the gate and kicks those that are
// inside; nothing polls. A vCPU that comes out with a port or memory access half
// done goes in again, with immediate exit set, until the kernel has completed
// it: only then it counts as stopped, and only then is what the guest wrote in
// its memory.
//
// # State
//
// [Machine.SaveState] and [Machine.LoadState] carry over everything but memory
// as plain structs; their comments say in what order, and why. Package migrate
// carries over the memory, for which a Machine is a source, and what [Builder]
// makes a destination.
package vmm
