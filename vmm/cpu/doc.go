// Package cpu decides what processor a guest sees: CPUID leaves made from what KVM
// supports on this host, baselines that different hosts share, and the list of MSRs
// that travel with a vCPU. [Differences] tells why a guest that has seen one
// processor cannot run on another.
package cpu
