package elftest

import "encoding/binary"

// What BzImage makes, as offsets in its file.
const (
	bzSetup = 3 * 512
	// bzEntry is where the 64-bit entry's code is.
	bzEntry = bzSetup + 0x200
	// BzImagePayload is where the payload is.
	BzImagePayload = bzSetup + 0x400
)

// BzImage makes a bzImage as Linux 3.8 was, boot protocol 2.12, whose setup
// header ends with init_size (2.13 and later add to it): relocatable, at 16 MiB
// by preference, with 4 MiB to run in. At its 64-bit entry is code, up to 512
// bytes; the payload is what is to be unpacked, and may be nothing.
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
