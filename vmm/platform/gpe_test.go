package platform

import "testing"

// An event raises the interrupt if the guest has enabled it, until it is acknowledged; it
// waits for a guest that has not.
func TestGPE(t *testing.T) {
	level := false
	d := NewGPE(func(l bool) { level = l })
	read := func(off uint64) byte {
		var p [1]byte
		d.Read(off, p[:])
		return p[0]
	}
	if d.InUse() {
		t.Error("a new one is in use")
	}
	d.Raise(GPEGeneration)
	if level || read(0) != 1 || read(1) != 0 {
		t.Errorf("not enabled: level %v, status %#x", level, read(0))
	}
	d.Write(1, []byte{0xff})
	if !level || read(1) != GPEGeneration {
		t.Errorf("enabled: level %v, enable %#x", level, read(1))
	}
	d.Write(0, []byte{0xfe})
	if !level {
		t.Error("another bit was cleared")
	}
	d.Write(0, []byte{1, 1}) // both registers
	if level || read(0) != 0 || !d.InUse() {
		t.Errorf("acknowledged: level %v, status %#x", level, read(0))
	}
	p := []byte{9, 9, 9, 9}
	d.Read(1, p)
	if p[0] != 1 || p[1] != 0 || p[3] != 0 {
		t.Errorf("read beyond the block: %v", p)
	}
}

// FuzzGPE lets a guest do anything with the registers, while events happen: the interrupt
// follows the registers, and a state that was saved loads and is the same.
func FuzzGPE(f *testing.F) {
	f.Add([]byte{0, 1, 1, 1, 2, 0})
	f.Fuzz(func(t *testing.T, ops []byte) {
		level := false
		d := NewGPE(func(l bool) { level = l })
		for ; len(ops) >= 2; ops = ops[2:] {
			if ops[0]&0x80 != 0 {
				d.Raise(GPEGeneration)
			} else {
				d.Write(uint64(ops[0]%4), []byte{ops[1], ops[1] >> 4}[:1+ops[0]>>6])
			}
			s := d.SaveState()
			if level != (s.Status&s.Enable != 0) {
				t.Fatalf("the interrupt is %v with %+v", level, s)
			}
			var got bool
			other := NewGPE(func(l bool) { got = l })
			if err := other.LoadState(s); err != nil || other.SaveState() != s || got != level {
				t.Fatalf("%+v loads as %+v, interrupt %v: %v", s, other.SaveState(), got, err)
			}
		}
		if NewGPE(func(bool) {}).LoadState(GPEState{Enable: 2}) == nil {
			t.Fatal("a reserved bit was loaded")
		}
	})
}
