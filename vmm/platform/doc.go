// Package platform has the small devices of a PC that are no part of KVM: ACPI
// power management ([PM]), the CMOS memory with its clock ([CMOS]) and pvpanic
// ([PVPanic]). Each answers accesses to its ports by Read and Write, whose
// offsets count from its first port; each has a plain state that travels in a
// migration. All methods may be called at once from several threads.
package platform
