// Package netproc connects a VM's process with the process of its network: Ethernet
// frames over a stream socket, messages beside them, and how that process is started.
//
// A frame on a stream is its length in four bytes, big endian, and its bytes: QEMU's
// "stream" protocol, which passt and gvproxy speak.
package netproc

import _ "github.com/govmm/govmm/internal/supported" // Linux on x86-64 only
