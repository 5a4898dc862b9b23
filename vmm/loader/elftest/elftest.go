// Package elftest builds small PVH kernels and bzImages for tests, from machine code.
package elftest

import "encoding/binary"

// Kernel describes a kernel.
type Kernel struct {
	// Code is the content of the kernel's segment: 32-bit code with its entry at
	// the first byte, or at Entry.
	Code []byte
	// Load is the guest physical address of the segment; 0 means 1 MiB.
	Load uint64
	// Entry is the entry point; 0 means Load.
	Entry uint32
	// BSS is the number of zero bytes after the code.
	BSS uint64
}

// Build returns the kernel as an ELF file: a header, a PT_LOAD and a PT_NOTE segment,
// the note and the code.
func Build(k Kernel) []byte {
	const (
		headerSize = 64
		phdrSize   = 56
		noteAt     = headerSize + 2*phdrSize
		noteSize   = 12 + 4 + 4
		codeAt     = 0x1000
	)
	if k.Load == 0 {
		k.Load = 1 << 20
	}
	if k.Entry == 0 {
		k.Entry = uint32(k.Load)
	}
	le := binary.LittleEndian
	f := make([]byte, codeAt, codeAt+len(k.Code))
	copy(f, "\x7fELF\x02\x01\x01") // 64-bit, little-endian, version 1
	le.PutUint16(f[16:], 2)        // ET_EXEC
	le.PutUint16(f[18:], 62)       // EM_X86_64
	le.PutUint32(f[20:], 1)
	le.PutUint64(f[24:], uint64(k.Entry))
	le.PutUint64(f[32:], headerSize) // e_phoff
	le.PutUint16(f[52:], headerSize)
	le.PutUint16(f[54:], phdrSize)
	le.PutUint16(f[56:], 2)

	load := f[headerSize:]
	le.PutUint32(load[0:], 1) // PT_LOAD
	le.PutUint32(load[4:], 7) // readable, writable, executable
	le.PutUint64(load[8:], codeAt)
	le.PutUint64(load[16:], k.Load) // p_vaddr
	le.PutUint64(load[24:], k.Load) // p_paddr
	le.PutUint64(load[32:], uint64(len(k.Code)))
	le.PutUint64(load[40:], uint64(len(k.Code))+k.BSS)
	le.PutUint64(load[48:], 0x1000)

	note := f[headerSize+phdrSize:]
	le.PutUint32(note[0:], 4) // PT_NOTE
	le.PutUint32(note[4:], 4)
	le.PutUint64(note[8:], noteAt)
	le.PutUint64(note[32:], noteSize)
	le.PutUint64(note[40:], noteSize)
	le.PutUint64(note[48:], 4)

	n := f[noteAt:]
	le.PutUint32(n[0:], 4)  // name size
	le.PutUint32(n[4:], 4)  // descriptor size
	le.PutUint32(n[8:], 18) // XEN_ELFNOTE_PHYS32_ENTRY
	copy(n[12:], "Xen\x00")
	le.PutUint32(n[16:], k.Entry)
	return append(f, k.Code...)
}
