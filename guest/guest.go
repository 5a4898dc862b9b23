// Package guest holds govmm's demo guest: a program that runs alone on a virtual machine, owns and rewrites memory as
// it is told, and checks that every page is what it last wrote there. A VM without a kernel of its own boots it.
//
// The sources are C and assembly in guest/src; docs/guest.md says what it does and prints. `make -C guest check`
// rebuilds it and compares.
package guest

import _ "embed"

// ELF is the guest as a 64-bit PVH ELF: it has the note XEN_ELFNOTE_PHYS32_ENTRY (Xen, public/elfnote.h), is linked to
// run where it is loaded, from 1 MiB to below 2 MiB, and takes its words from the PVH start info's command line.
// It must not be modified.
//
//go:embed demo.elf
var ELF []byte

// DefaultCmdline gives a person something to watch and the host little to do: half of a 256 MiB machine is owned,
// some of it rewritten at a quiet pace, all of it verified every few seconds.
const DefaultCmdline = "fill=128M dirty=16M rate=1000 verify=5 tick=1"
