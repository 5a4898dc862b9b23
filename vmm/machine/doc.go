// Package machine is one machine on KVM: memory, vCPUs, interrupt controllers, a
// serial port, virtio devices, and the ports that switch it off. A [Machine] is made
// from a [Spec], booted or loaded from a saved state, run, paused, saved, and ended.
//
// # Devices
//
// A virtio device is one entry in a table of kinds ([Kinds]; [Spec] may add more).
// The entry makes a device's description from the words of a flag, opens what it
// needs of the host, adapts it to a destination, and plugs it in. See virtio.Kind.
//
// # vCPUs
//
// Each vCPU is a goroutine locked to its thread. All of them pass one gate before
// they enter the guest. Pausing closes the gate and kicks those that are inside;
// nothing polls. A vCPU that comes out in the middle of a port or memory access goes
// in again, with immediate exit set, until the kernel has completed the access. Only
// then does it count as stopped, and only then is what the guest wrote in its memory.
//
// # State
//
// [Machine.saveState] and [Machine.loadState] handle everything except memory, as
// plain structs; their comments give the order, and why. Package migrate moves the
// memory: [Machine.Source] is its source, and [Builder] makes its target.
package machine
