// Package platform emulates the small devices of a PC that KVM does not have: ACPI
// power management ([PM]), the CMOS memory with its clock ([CMOS]) and pvpanic
// ([PVPanic]). Read and Write handle accesses to a device's ports; offsets count
// from its first port. PM and CMOS have a state that a migration sends. All methods
// may be called by several threads at once.
package platform
