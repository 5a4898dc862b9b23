package elftest

import "encoding/binary"

// Offsets in the file that BzImage returns.
const (
	bzSetup = 3 * 512
	bzEntry = bzSetup + 0x200 // the code of the 64-bit entry
	// BzImagePayload is the offset of the payload.
	BzImagePayload = bzSetup + 0x400
)

// BzImage returns a bzImage with boot protocol 2.12, as of Linux 3.8. Its setup header
// ends with init_size; later versions have more fields. The kernel is relocatable,
// prefers 16 MiB and needs 4 MiB. code, up to 512 bytes, is at the 64-bit entry.
// payload is the compressed kernel, and may be empty.
func BzImage(code, payload []byte) []byte {
	const magic, headerEnd = 0x202, 0x264
	le := binary.LittleEndian
	size := (BzImagePayload + len(payload) - bzSetup + 15) &^ 15
	f := make([]byte, bzSetup+size)
	copy(f, "MZ")
	f[0x1f1] = bzSetup/512 - 1                 // setup_sects
	le.PutUint32(f[0x1f4:], uint32(size/16))   // syssize
	le.PutUint16(f[0x1fe:], 0xaa55)            // boot_flag
	f[0x200], f[0x201] = 0xeb, headerEnd-magic // jump
	copy(f[magic:], "HdrS")
	le.PutUint16(f[0x206:], 0x20c)      // version
	f[0x211] = 1                        // loadflags: LOADED_HIGH
	le.PutUint32(f[0x22c:], 0x7fffffff) // initrd_addr_max
	le.PutUint32(f[0x230:], 2<<20)      // kernel_alignment
	f[0x234] = 1                        // relocatable_kernel
	le.PutUint16(f[0x236:], 3)          // xloadflags: 64-bit, above 4 GiB
	le.PutUint32(f[0x238:], 255)        // cmdline_size
	le.PutUint32(f[0x248:], BzImagePayload-bzSetup)
	le.PutUint32(f[0x24c:], uint32(len(payload)))
	le.PutUint64(f[0x258:], 16<<20) // pref_address
	le.PutUint32(f[0x260:], 4<<20)  // init_size
	copy(f[bzEntry:BzImagePayload], code)
	copy(f[BzImagePayload:], payload)
	return f
}
