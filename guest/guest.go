// Package guest contains govmm's demo guest: a program that runs alone on a virtual machine, owns and rewrites memory as
// configured, and checks that every page is what it last wrote there. A VM without a kernel boots it.
//
// The sources are C and assembly in guest/src; docs/guest.md describes its words and output. `make -C guest check`
// compares it with a new build.
package guest

import _ "embed"

// ELF is the guest as a 64-bit PVH ELF. It has the note XEN_ELFNOTE_PHYS32_ENTRY (Xen, public/elfnote.h), is loaded and
// linked between 1 MiB and 2 MiB, and gets its words from the command line in the PVH start info. It must not be
// modified.
//
//go:embed demo.elf
var ELF []byte

// DefaultCmdline is for a person who watches, and uses little of the host: half of a 256 MiB machine is owned, some of
// it is rewritten slowly, and all of it is verified every few seconds.
const DefaultCmdline = "fill=128M dirty=16M rate=1000 verify=5 tick=1"
