// Package kernel makes what tests boot: the Linux test kernel (build.sh), its
// first processes (init/), initial RAM disks and root disks; and it reads the
// report page in which those processes count what they saw (docs/testing.md).
package kernel
