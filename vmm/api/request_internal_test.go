package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/govmm/govmm/vmm"
)

// FuzzMigrateRequest: whatever a client sends is refused as its mistake or
// gives options within their bounds, and what was understood survives a round
// trip.
func FuzzMigrateRequest(f *testing.F) {
	for _, s := range []string{
		``, `{}`, `{"to":"h:1"}`, `{"to":"[::1]:65535","downtime_limit":"300ms","timeout":"1h","bandwidth_limit":104857600}`,
		`{"to":"h:1","clear_bitmap_shift":31,"max_rounds":3,"auto_converge":true,"verify_pages":true}`, `{"to":"h:1"}{}`, `{"To":"h:1"}`,
		`{"downtime_limit":"9223372036854775807ns"}`, `null`, `[`, `{"to":"h:1","downtime_limit":"-1ns"}`,
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var req MigrateRequest
		if err := decodeStrict(bytes.NewReader(data), &req); err != nil {
			if !errors.Is(err, vmm.ErrInvalid) {
				t.Fatalf("%q: %v", data, err)
			}
			return
		}
		opt, err := req.Options()
		if err != nil {
			if !errors.Is(err, vmm.ErrInvalid) || bytes.ContainsRune([]byte(err.Error()), '\n') {
				t.Fatalf("%q: %v", data, err)
			}
			return
		}
		if err := opt.Validate(); err != nil {
			t.Fatalf("%q gives options out of bounds: %v", data, err)
		}
		again, err := json.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		var req2 MigrateRequest
		if err := decodeStrict(bytes.NewReader(again), &req2); err != nil || req2 != req {
			t.Fatalf("%+v became %+v: %v", req, req2, err)
		}
	})
}
