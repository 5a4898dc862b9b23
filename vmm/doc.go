// Package vmm is virtual machines on KVM: what a user calls a VM. A [VM] has a name,
// goes on when its guest resets itself, and moves to another process or host while
// it runs.
//
//	vm, err := vmm.NewVM(vmm.Config{CPUs: 2, Memory: 512 << 20, Serial: backend})
//	...
//	outcome, err := vm.Run(ctx) // until the guest ends or has moved away
//
// In the process that is to get the guest:
//
//	vm, err := vmm.NewReceiver(vmm.ReceiveConfig{Listener: listener, Serial: backend})
//	...
//	outcome, err := vm.Run(ctx) // waits for a guest, then runs it
//
// And to move it, in the first process:
//
//	result, err := vm.Migrate(ctx, "host:7777", migrate.Options{})
//
// Below is package machine: one machine on KVM, from its making to its end, with its
// spec and its state. A VM has one machine at a time, and a new one after each reset.
// It calls the machine's methods and knows nothing of its inside.
//
// Errors that a caller can act on match [ErrState] or [ErrInvalid]; those of a
// migration match the errors of package migrate.
package vmm
