package api_test

import (
	"bytes"
	"encoding/json"
	"net/http/httptest"
	"testing"

	"github.com/govmm/govmm/vmm/api"
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
	vm := &fakeVM{}
	handler := api.NewServer[*fakeMigration](vm, "/run/x.sock").Handler()
	f.Fuzz(func(t *testing.T, data []byte) {
		estimate := func(body []byte) int {
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, httptest.NewRequest("POST", "/v1/migration/estimate", bytes.NewReader(body)))
			if w.Code != 200 && w.Code != 400 {
				t.Fatalf("%q: %d %s", body, w.Code, w.Body)
			}
			return w.Code
		}
		if estimate(data) != 200 {
			return
		}
		if err := vm.opt.Validate(); err != nil {
			t.Fatalf("%q gives options out of bounds: %v", data, err)
		}
		var req api.MigrateRequest
		if err := json.Unmarshal(data, &req); err != nil {
			t.Fatalf("%q was understood, and cannot be decoded: %v", data, err)
		}
		again, err := json.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		if estimate(again) != 200 {
			t.Fatalf("%q became %q, which is refused", data, again)
		}
	})
}
